"""OrtProgram against the module it was exported from, and its guarantees about memory and errors."""

from __future__ import annotations

import contextlib
import logging
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.ort import OrtOptions, OrtProgram, read_graph_file
from realtide.engines.runtime.program import Array, FeedError, ProgramError, allocate_state
from realtide.engines.runtime.torch_program import TorchProgram
from realtide.engines.runtime.weights import WeightFile
from tests.engines.runtime.cell import ROWS, WIDTH, Exported, feeds, state


@pytest.fixture
def caches() -> dict[str, Array]:
    return state()


@pytest.fixture
def program(exported: Exported, caches: dict[str, Array]) -> OrtProgram:
    return OrtProgram(exported.graph, WeightFile(exported.weights), caches)


def test_agrees_with_torch_over_runs_of_every_size(
    exported: Exported, program: OrtProgram, caches: dict[str, Array]
) -> None:
    theirs = state()
    reference = TorchProgram(exported.module, program.inputs, program.outputs, program.state, theirs)
    for seed, count in enumerate((3, 0, 7, 1, ROWS, 0, 5)):
        batch = feeds(count, seed)
        want, got = reference.run(batch), program.run(batch)
        assert list(got) == ["y", "picked"]
        assert np.array_equal(want["picked"], got["picked"])
        np.testing.assert_allclose(got["y"], want["y"], atol=1e-5)
        for name, cache in caches.items():
            np.testing.assert_allclose(cache, theirs[name], atol=1e-5)
    assert np.abs(caches["keys"]).max() > 0.1


def test_state_is_the_callers_memory(program: OrtProgram, caches: dict[str, Array]) -> None:
    addresses = {name: array.ctypes.data for name, array in caches.items()}
    bound = program._binding.get_outputs()
    assert [value.data_ptr() for value in bound[:2]] == [addresses["keys"], addresses["values"]]
    program.run(feeds(4))
    bound = program._binding.get_outputs()
    assert [value.data_ptr() for value in bound[:2]] == [addresses["keys"], addresses["values"]]
    # What the caller writes between runs is what the next run reads.
    for cache in caches.values():
        cache[...] = 0
    batch = feeds(0)
    batch["mask"] = np.ones(ROWS, bool)
    quiet = program.run(batch)["y"]
    assert np.array_equal(quiet, np.broadcast_to(quiet[0], quiet.shape))


def test_one_loaded_graph_runs_over_several_states(program: OrtProgram, caches: dict[str, Array]) -> None:
    theirs = state()
    twin = program.over(theirs)
    assert twin._session is program._session
    want = program.run(feeds(4, 1))
    kept = {name: array.copy() for name, array in caches.items()}
    program.run(feeds(3, 2))
    got = twin.run(feeds(4, 1))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    for name, array in kept.items():
        np.testing.assert_array_equal(theirs[name], array)
        assert np.abs(caches[name] - array).max() > 0
    with pytest.raises(FeedError):
        program.over({})


def test_rows_that_a_run_does_not_write_stay_bit_for_bit(
    program: OrtProgram, caches: dict[str, Array]
) -> None:
    random = np.random.default_rng(5)
    for cache in caches.values():
        cache[...] = random.standard_normal(cache.shape)
    before = {name: cache.copy() for name, cache in caches.items()}
    batch = feeds(3)
    program.run(batch)
    untouched = np.setdiff1d(np.arange(ROWS), batch["rows"])
    for name, cache in caches.items():
        assert np.array_equal(cache[untouched], before[name][untouched])
        assert not np.any(cache[batch["rows"]] == before[name][batch["rows"]])


def test_a_large_cache_is_neither_copied_nor_committed(exported: Exported) -> None:
    """Two caches of 1 GB: a copy of either would show in the peak of the resident memory."""
    rows = 1 << 24
    info = read_graph_file(exported.graph)
    caches = allocate_state(info.state, {"R": rows})
    assert all(cache.nbytes == 1 << 30 for cache in caches.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = OrtProgram(exported.graph, WeightFile(exported.weights), caches)
    for seed in range(3):
        batch = feeds(5, seed)
        batch["rows"] = np.array([0, 1, rows // 2, rows - 2, rows - 1])
        program.run(batch)
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert caches["keys"][rows - 1].any()
    assert peak_mb < 100


def test_results_belong_to_the_caller(program: OrtProgram) -> None:
    first = program.run(feeds(3, 1))
    kept = {name: array.copy() for name, array in first.items()}
    program.run(feeds(9, 2))
    for name, array in first.items():
        assert np.array_equal(array, kept[name])


def test_weights_may_be_freed_after_loading(exported: Exported) -> None:
    """The session copies injected initializers: overwriting ours afterwards changes nothing."""
    weights: dict[str, Array] = {name: value.copy() for name, value in WeightFile(exported.weights).items()}
    first, second = (OrtProgram(exported.graph, weights, state()) for _ in range(2))
    batch = feeds(6)
    before = first.run(batch)["y"]
    for array in weights.values():
        array[...] = np.nan
    assert np.array_equal(second.run(batch)["y"], before)


def test_weights_stored_as_float16(exported: Exported) -> None:
    halves = {name: value.astype(np.float16) for name, value in WeightFile(exported.weights).items()}
    rounded = {name: value.astype(np.float32) for name, value in halves.items()}
    batch = feeds(6)
    from_halves = OrtProgram(exported.graph, halves, state()).run(batch)["y"]
    from_rounded = OrtProgram(exported.graph, rounded, state()).run(batch)["y"]
    assert np.array_equal(from_halves, from_rounded)
    assert not np.array_equal(
        from_halves, OrtProgram(exported.graph, WeightFile(exported.weights), state()).run(batch)["y"]
    )


def test_inputs_need_not_be_contiguous_or_writeable(program: OrtProgram, caches: dict[str, Array]) -> None:
    batch = feeds(6)
    want = program.run(batch)["y"]
    for cache in caches.values():
        cache[...] = 0
    wide = np.zeros((6, 2 * WIDTH), np.float32)
    wide[:, ::2] = batch["x"]
    batch["x"] = wide[:, ::2]
    batch["rows"].flags.writeable = False
    assert np.array_equal(program.run(batch)["y"], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"input 'x' \(float32\[n, 16\]\) is missing"),
        ({"x": np.zeros((3, 15), np.float32)}, r"'x' must be float32\[n, 16\], not float32\[3, 15\]"),
        ({"x": np.zeros((3, 16))}, r"'x' must be float32\[n, 16\], not float64\[3, 16\]"),
        ({"rows": np.zeros((3, 1), np.int64)}, r"'rows' must be int64\[n\], not int64\[3, 1\]"),
        ({"mask": [True]}, r"'mask' must be a numpy array bool\[m\], not list"),
        ({"other": np.zeros(3)}, r"unknown input 'other'"),
    ],
)
def test_wrong_feeds_are_named(
    program: OrtProgram, caches: dict[str, Array], change: Mapping[str, Array | None], message: str
) -> None:
    batch = {**feeds(3), **change}
    with pytest.raises(FeedError, match=message):
        program.run({name: value for name, value in batch.items() if value is not None})
    assert not any(cache.any() for cache in caches.values())


def test_a_failing_run_is_reported_and_the_next_one_works(
    program: OrtProgram, capfd: pytest.CaptureFixture[str]
) -> None:
    batch = feeds(3)
    batch["rows"] = np.array([0, 1, ROWS])
    with pytest.raises(ProgramError, match=r"cell\.onnx: run failed with x \[3, 16\].*"):
        program.run(batch)
    assert program.run(feeds(3))["y"].shape[1] == WIDTH
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"keys": np.zeros((ROWS, WIDTH), np.float32)}, r"state 'values' \(float32\[R, 16\]\) is missing"),
        ({**state(), "more": np.zeros(1)}, r"unknown state 'more'"),
        (
            {**state(), "keys": np.zeros((ROWS, 3), np.float32)},
            r"state 'keys' must be float32\[R, 16\], not float32\[21, 3\]",
        ),
        ({**state(), "keys": np.zeros((WIDTH, ROWS), np.float32).T}, r"state 'keys' must be C-contiguous"),
        ({name: np.zeros((ROWS, WIDTH), np.float32)[:] for name in ("keys", "values")}, None),
    ],
)
def test_state_is_checked(exported: Exported, arrays: Mapping[str, Array], message: str | None) -> None:
    weights = WeightFile(exported.weights)
    if message is None:
        OrtProgram(exported.graph, weights, arrays)
        return
    with pytest.raises(FeedError, match=message):
        OrtProgram(exported.graph, weights, arrays)


def test_state_arrays_must_not_overlap(exported: Exported) -> None:
    both = np.zeros((ROWS, WIDTH), np.float32)
    with pytest.raises(FeedError, match="state 'values' shares memory with state 'keys'"):
        OrtProgram(exported.graph, WeightFile(exported.weights), {"keys": both, "values": both})


def test_weights_are_checked(exported: Exported) -> None:
    weights = dict(WeightFile(exported.weights))
    with pytest.raises(ProgramError, match=r"weight 'mix.bias' must be float32\[16\], not float32\[3\]"):
        OrtProgram(exported.graph, {**weights, "mix.bias": np.zeros(3, np.float32)}, state())
    with pytest.raises(ProgramError, match=r"weight 'mix\.bias' must be float32.*, not int64"):
        OrtProgram(exported.graph, {**weights, "mix.bias": np.zeros(16, np.int64)}, state())
    del weights["mix.bias"]
    with pytest.raises(ProgramError, match=r"wants weight 'mix\.bias', which the weight file lacks"):
        OrtProgram(exported.graph, weights, state())


def test_unusable_providers_are_warned_about(exported: Exported, caplog: pytest.LogCaptureFixture) -> None:
    options = OrtOptions(providers=("NoSuchExecutionProvider", "CPUExecutionProvider"))
    with caplog.at_level(logging.WARNING):
        program = OrtProgram(exported.graph, WeightFile(exported.weights), state(), options)
    assert program.providers == ("CPUExecutionProvider",)
    assert "NoSuchExecutionProvider not usable here" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        OrtProgram(exported.graph, WeightFile(exported.weights), state())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ()}, "providers must name"),
        ({"intra_op_num_threads": 0}, "intra_op_num_threads must be at least 1, not 0"),
        ({"provider_options": {"X": {}}}, "provider_options for X"),
    ],
)
def test_options_check_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrtOptions(**options)  # type: ignore[arg-type]


def test_a_file_that_is_no_graph(exported: Exported, tmp_path: Path) -> None:
    data = exported.graph.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(500):
        noise = bytearray(data)
        for at in random.integers(0, len(data), 3):
            noise[at] = random.integers(256)
        with contextlib.suppress(ProgramError):  # the only exception that damage may cause
            read_graph(bytes(noise))
    for damaged in (b"", b"\xff" * 64, data[: len(data) // 2]):
        with pytest.raises(ProgramError):
            OrtProgram(damaged, WeightFile(exported.weights), state())
    with pytest.raises(ProgramError, match="No such file"):
        OrtProgram(exported.graph.with_name("absent.onnx"), {}, {})
    with pytest.raises(ProgramError, match=r"weights\.safetensors"):
        read_graph_file(exported.weights)


def test_file_reader_agrees_with_the_onnx_package(exported: Exported) -> None:
    info = read_graph_file(exported.graph)
    model = onnx.load(exported.graph, load_external_data=False)

    def described(values: object) -> list[tuple[str, int, list[object]]]:
        return [
            (
                v.name,
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values  # type: ignore[attr-defined]
        ]

    def ours(specs: object) -> list[tuple[str, int, list[object]]]:
        return [
            (s.name, onnx.helper.np_dtype_to_tensor_dtype(s.dtype), list(s.shape))
            for s in specs  # type: ignore[attr-defined]
        ]

    assert ours((*info.inputs, *info.state)) == described(model.graph.input)
    assert list(info.output_names) == [v.name for v in model.graph.output]
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert [(s.name, list(s.shape)) for s in info.external] == [(t.name, list(t.dims)) for t in external]


def test_allocate_state_follows_the_specs(exported: Exported) -> None:
    specs = read_graph_file(exported.graph).state
    arrays = allocate_state(specs, {"R": 12})
    assert {name: array.shape for name, array in arrays.items()} == {
        "keys": (12, WIDTH),
        "values": (12, WIDTH),
    }
    with pytest.raises(FeedError, match=r"state 'keys' is float32\[R, 16\]: no size given for R"):
        allocate_state(specs)


def test_torch_program_copies_nothing_when_the_module_writes_in_place(exported: Exported) -> None:
    info = read_graph_file(exported.graph)
    arrays = state()
    program = TorchProgram(exported.module, info.inputs, info.outputs, info.state, arrays)
    seen: list[int] = []
    handle = exported.module.register_forward_hook(
        lambda module, args, result: seen.extend(t.data_ptr() for t in result[2:])
    )
    program.run(feeds(3))
    handle.remove()
    assert seen == [arrays["keys"].ctypes.data, arrays["values"].ctypes.data]
    assert arrays["keys"].any()


def test_torch_program_takes_functional_modules_too() -> None:
    class Functional(torch.nn.Module):
        def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return total, total + x

    from realtide.engines.runtime.program import TensorSpec

    spec = [TensorSpec(name, np.dtype(np.float32), (2,)) for name in ("x", "old", "total")]
    total = np.ones(2, np.float32)
    program = TorchProgram(Functional(), spec[:1], spec[1:2], spec[2:], {"total": total})
    old = program.run({"x": np.full(2, 3, np.float32)})["old"]
    assert old.tolist() == [1, 1]
    assert total.tolist() == [4, 4]
    with pytest.raises(FeedError, match="input 'x'"):
        program.run({})


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["onnx"] = None  # importing either raises ImportError
import numpy as np
from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.ort import OrtProgram, read_graph_file
from realtide.engines.runtime.program import allocate_state
from realtide.engines.runtime.weights import WeightFile
graph, weights, feeds, results = sys.argv[1:]
state = allocate_state(read_graph_file(graph).state, {"R": 21})
np.savez(results, **OrtProgram(graph, WeightFile(weights), state).run(dict(np.load(feeds))))
"""


def test_runs_where_torch_cannot_be_imported(exported: Exported, program: OrtProgram, tmp_path: Path) -> None:
    batch = feeds(4)
    np.savez(tmp_path / "feeds.npz", **batch)  # type: ignore[arg-type]
    files = [exported.graph, exported.weights, tmp_path / "feeds.npz", tmp_path / "results.npz"]
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *map(str, files)], check=True)
    results = np.load(tmp_path / "results.npz")
    for name, array in program.run(batch).items():
        assert np.array_equal(results[name], array)
