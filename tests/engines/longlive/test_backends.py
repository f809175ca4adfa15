"""Video on a device's memory: nothing goes to the host but frames, in float32 and bfloat16 alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realtide.bundle import BundleError, load_bundle
from realtide.engines.longlive import backends
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.graphs import architecture
from realtide.engines.longlive.types import SetPrompt
from realtide.engines.runtime.memory import HOST
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.torch_memory import TorchMemory
from tests.engines.longlive.conftest import Player, video_config
from tests.engines.longlive.test_engine import OPTIONS, levels_apart, run


def engine(bundle: Path, **options: Any) -> LongLiveEngine:
    return load(bundle, slots=1, backend="torch", **options)


class NoReading(TorchMemory):
    """Fails where something is read to the host."""

    def get(self, values: torch.Tensor) -> Array:
        raise AssertionError("read to the host")


def test_generating_reads_nothing_to_the_host_and_leaves_the_caches_where_they_are() -> None:
    player = Player(video_config(rotary="relative"))
    programs, arrays = player.bound()
    cache = {name: torch.from_numpy(array) for name, array in arrays.items()}
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in cache.items()}
    stream = VideoStream(player.config, programs, cache, 5, memory=NoReading())
    same = VideoStream(player.config, *player.bound(), 5, memory=HOST)
    for number in (1, None, None, None, 2, None):
        if number:
            assert stream.set_prompt(player.text(number)) == same.set_prompt(player.text(number))
        latents = stream.block()
        assert isinstance(latents, torch.Tensor)
        np.testing.assert_array_equal(latents.numpy(), same.block())
    for name, (address, _) in before.items():
        assert cache[name].data_ptr() == address
    with pytest.raises(AssertionError, match="read to the host"):
        stream.export()


def test_a_pass_looks_at_the_places_that_hold_frames_only() -> None:
    """There is one program for each number of frames that the window holds, and they are kept."""
    player = Player(video_config())
    programs, cache = player.bound()
    stream = VideoStream(player.config, programs, cache, 5)
    stream.set_prompt(player.text(1))
    for _ in range(5):
        stream.block()
    assert sorted(programs.denoise._programs) == [2, 4, 6]  # type: ignore[attr-defined]
    assert sorted(programs.clean._programs) == [2, 4, 6]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("origin", "target"), [("torch", "onnxruntime"), ("onnxruntime", "torch")])
def test_checkpoints_with_caches_move_between_host_and_device(
    video_bundle: Path, origin: str, target: str
) -> None:
    engines = [load(video_bundle, slots=1, backend=backend) for backend in (origin, target)]
    first, whole = engines[0].open(replace(OPTIONS, credit=9)), load(video_bundle, slots=1, backend=target)
    wanted = run(whole, [whole.open(OPTIONS)])[0]
    first._length = 9
    begun = run(engines[0], [first])[0]
    first.settle()
    checkpoint = first.export(cache=True)
    resumed = engines[1].restore(checkpoint, OPTIONS)
    frames = begun + run(engines[1], [resumed])[0]
    assert len(frames) == len(wanted) == 23
    assert max(np.abs(a - b).max() for a, b in zip(frames, wanted, strict=True)) <= 1
    for each in (*engines, whole):
        each.close()


def test_float8_is_near_float32_and_in_bfloat16_but_for_the_products_of_blocks() -> None:
    bundle = Path(__file__).resolve().parents[3] / "models" / "longlive-emoji"
    wide, narrow = engine(bundle), engine(bundle, precision="fp8")
    assert (narrow.info.precision, narrow.info.backend) == ("fp8", "torch")
    assert 0.1 < levels_apart(wide, narrow) < 2


def test_a_model_whose_layers_do_not_fit_is_refused_in_float8(video_bundle: Path) -> None:
    with pytest.raises(ProgramError, match=r"^small-video: no layer of a block can be in float8$"):
        engine(video_bundle, precision="fp8")


def test_bfloat16_is_near_float32_and_goes_on_from_its_own_checkpoints(video_bundle: Path) -> None:
    wide, narrow = engine(video_bundle), engine(video_bundle, precision="bf16")
    assert (narrow.info.precision, narrow.info.backend, narrow.info.device) == ("bf16", "torch", "cpu")
    assert narrow.cache_bytes * 2 == wide.cache_bytes
    frames = {}
    for each in (wide, narrow):
        session = each.open(OPTIONS)
        session.push(SetPrompt("c", "the sun sets", 7))
        frames[each] = np.stack(run(each, [session])[0])
        session.close()
    far = np.abs(frames[wide] - frames[narrow])
    assert 0 < far[:3].mean() < 4  # levels of 255, before two chaotic systems drift apart
    first = narrow.open(OPTIONS)
    first._length = 9
    begun = run(narrow, [first])[0]
    first.settle()
    resumed = engine(video_bundle, precision="bf16").restore(first.export(cache=True), OPTIONS)
    kept = resumed._parts.caches.first.keys
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.values())
    for name, tensor in first._parts.caches.first.keys.items():
        assert torch.equal(tensor, kept[name])
    assert len(begun) == 9


def test_compiled_video_is_the_same(video_bundle: Path, captured: list[str]) -> None:
    plain, compiled = engine(video_bundle), engine(video_bundle, compiled=True)
    assert set(captured) == {"Denoise", "Remember", "DecodeFirst", "DecodeNext"}  # while it was loaded
    before = len(captured)
    frames = [np.stack(run(each, [each.open(OPTIONS)])[0]) for each in (plain, compiled)]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    assert len(captured) == before


def test_pytorch_computes_in_float32_and_bfloat16_only(video_bundle: Path) -> None:
    with pytest.raises(
        BundleError,
        match="precision must be one of float32, bfloat16, float8 with the backend torch, not 'float16'",
    ):
        engine(video_bundle, precision="fp16")


def test_warming_up_runs_every_size_and_harms_nothing(video_bundle: Path) -> None:
    loaded = engine(video_bundle)
    wanted = run(loaded, [loaded.open(OPTIONS)])[0]
    config = loaded._parts.config
    bundle = load_bundle(video_bundle)
    _, vae, text = architecture(bundle.manifest.architecture)
    model = backends.Model(bundle, "float32", config, vae, text, {})
    other = engine(video_bundle)
    cache = other._parts.caches.first
    backends.warm_up(model, cache, other._parts.memory)
    sizes = list(range(config.stream.block, config.stream.window + 1, config.stream.block))
    assert sorted(cache.programs.denoise._programs) == sizes  # type: ignore[attr-defined]
    found = run(other, [other.open(OPTIONS)])[0]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
