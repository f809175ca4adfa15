"""TensorRT programs on a stand-in for engine and device: what is bound, in which order, with what result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realtide.bundle import load_bundle
from realtide.engines.longlive import graphs
from realtide.engines.runtime import tensorrt_program
from realtide.engines.runtime.cuda_memory import CudaDevice
from realtide.engines.runtime.narrow import narrow_graph
from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array, FeedError, ProgramError
from realtide.engines.runtime.tensorrt import Sizes
from realtide.engines.runtime.tensorrt_bindings import bindings_of
from realtide.engines.runtime.tensorrt_program import Scratch, TensorrtProgram
from realtide.engines.runtime.weights import WeightFile
from realtide.variants import manifest_values
from tests.engines.runtime.tensorrt_stand_in import Engine, HostDevice, tensors

BUNDLE = load_bundle(Path(__file__).resolve().parents[3] / "models" / "longlive-emoji")
SIZES = {"frames": Sizes(1, 9, 12)}


@dataclass
class Video:
    """Two programs of one session over one cache, in half precision."""

    graphs: dict[str, bytes]
    infos: dict[str, GraphInfo]
    weights: Mapping[str, Array]
    feeds: dict[str, dict[str, Array]]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Video:
    folder = tmp_path_factory.mktemp("video")
    config, _, _ = graphs.architecture(manifest_values(BUNDLE)["architecture"])
    later = 3 * config.stream.window
    found = {}
    for name in ("denoise", "recache"):
        narrow_graph(BUNDLE.graph(name, "float32"), folder / name, "float16")
        found[name] = (folder / name).read_bytes()
    feeds = {
        "denoise": graphs.pass_feeds(config, later, config.stream.block, 500.0),
        "recache": graphs.pass_feeds(config, later, 9, 0.0),
        "short": graphs.pass_feeds(config, later, 5, 0.0),
    }
    half = {
        name: {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in given.items()}
        for name, given in feeds.items()
    }
    infos = {name: read_graph(data) for name, data in found.items()}
    return Video(found, infos, WeightFile(BUNDLE.weights), half)


class Made:
    """A program, its device, and the same thing on onnxruntime."""

    def __init__(self, video: Video, name: str, scratch: Scratch | None = None, **options: Any) -> None:
        scratch = scratch or Scratch(HostDevice())
        assert isinstance(scratch.device, HostDevice)
        self.device = scratch.device
        declared = options.pop("declared", frozenset())
        self.engine = Engine(self.device, video.graphs[name], video.weights, SIZES, declared)
        fresh = tensors(video.infos[name], torch.Generator().manual_seed(3))
        self.state = options.pop("state", None) or fresh
        self.begun = {key: value.clone() for key, value in self.state.items()}
        self.mirror = {key: value.numpy().copy() for key, value in self.state.items()}
        self.oracle = OrtProgram(video.graphs[name], video.weights, self.mirror)
        self.program = TensorrtProgram(
            self.engine.loaded(), video.infos[name], self.state, scratch=scratch, **options
        )
        self.device.calls.clear()

    def check(self, feeds: dict[str, Array]) -> list[str]:
        """Run both; they agree on outputs and state. Returns the calls that were made."""
        self.device.calls.clear()
        have, want = self.program.run(feeds), self.oracle.run(feeds)
        assert set(have) == set(want)
        for name, array in want.items():
            np.testing.assert_array_equal(have[name], array)
        for name, value in self.state.items():
            np.testing.assert_array_equal(value.numpy(), self.mirror[name])
            assert not torch.equal(value, self.begun[name]), name
        return list(self.device.calls)


def test_a_step_computes_what_onnxruntime_does_and_updates_the_callers_state(video: Video) -> None:
    made = Made(video, "denoise")
    feeds = video.feeds["denoise"]
    other = feeds | {"latents": np.roll(feeds["latents"], 1, 0)}
    for given in (feeds, other, feeds, other):
        made.check(given)
    first = made.program.run(other)["flow"]
    kept = first.copy()
    made.program.run(video.feeds["denoise"])
    np.testing.assert_array_equal(first, kept)  # the caller owns what it got


def test_the_second_run_has_its_own_context_the_third_captures_and_later_ones_replay(video: Video) -> None:
    made = Made(video, "denoise")
    feeds = video.feeds["denoise"]
    names = list(feeds)
    bound = [call for name in names for call in (f"shape {name}", f"address {name}")]
    uploads = ["upload"] * len(names)
    rest = ["download", "before caller", "wait"]
    assert made.check(feeds) == ["after caller", *uploads, "scratch", *bound, "enqueue", "execute", *rest]
    states = [spec.name for spec in video.infos["denoise"].state]
    again = [call for name in states for call in (f"shape {name}", f"address {name}", f"address {name}.next")]
    again += ["address flow", "scratch", *bound, "enqueue", "execute"]
    assert made.check(feeds) == ["after caller", *uploads, *again, *rest]
    captured = ["capture", "enqueue", "replay", "execute"]
    assert made.check(feeds) == ["after caller", *uploads, *captured, *rest]
    for _ in range(2):
        assert made.check(feeds) == ["after caller", *uploads, "replay", "execute", *rest]


def test_without_cuda_graphs_every_step_is_enqueued(video: Video) -> None:
    made = Made(video, "denoise", cuda_graphs=False)
    for _ in range(3):
        calls = made.check(video.feeds["denoise"])
        assert ("enqueue" in calls, "capture" in calls, "replay" in calls) == (True, False, False)


def test_every_shape_has_its_own_graph_and_old_ones_are_given_up(
    video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = video.feeds["recache"], video.feeds["short"]

    def graphs_of(made: Made, *given: dict[str, Array]) -> list[str]:
        found = []
        for feeds in given:
            calls = made.check(feeds)
            found.append("capture" if "capture" in calls else "replay" if "replay" in calls else "plain")
        return found

    turns = graphs_of(Made(video, "recache"), *[long, short] * 4)
    assert turns == ["plain"] * 4 + ["capture"] * 2 + ["replay"] * 2

    monkeypatch.setattr(tensorrt_program, "MOST_GRAPHS", 1)
    made = Made(video, "recache")
    assert graphs_of(made, long, long, long, short) == ["plain", "plain", "capture", "plain"]
    assert made.check(short).count("wait") == 2  # nothing may be running of what is given up
    assert graphs_of(made, short, long, long, long) == ["capture", "plain", "capture", "replay"]


def test_what_was_seen_once_is_not_remembered_for_ever(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_program, "MOST_SEEN", 2)
    made = Made(video, "denoise")
    shapes = video.feeds["denoise"]
    given = [{name: torch.from_numpy(a.copy()) for name, a in shapes.items()} for _ in range(5)]
    for feeds in given:  # other addresses every time
        made.program.run_on_device(feeds)
    assert len(made.program._seen) == 2


def test_states_share_their_buffers_unless_they_are_to_be_copied(video: Video) -> None:
    names = [spec.name for spec in video.infos["denoise"].state]
    shared = bindings_of("plan", Made(video, "denoise").engine, video.infos["denoise"])
    found = [(binding.spec.name, binding.declared, binding.shared) for binding in shared.state]
    assert found == [(name, False, True) for name in names]
    assert shared.fixed
    assert not bindings_of("plan", Made(video, "recache").engine, video.infos["recache"]).fixed

    declared = frozenset(names[:3])
    made = Made(video, "denoise", share_state=False, declared=declared)
    copied = bindings_of("plan", made.engine, video.infos["denoise"], share=False)
    for binding in copied.state:
        assert binding.shared == binding.declared == (binding.spec.name in declared)
    for _ in range(4):  # plain, in a context of its own, captured, replayed
        assert made.check(video.feeds["denoise"]).count("copy back") == len(names) - 3


def test_programs_of_a_session_share_state_and_activations(video: Video) -> None:
    device = HostDevice()
    scratch = Scratch(device)
    first = Made(video, "denoise", scratch)
    second = Made(video, "recache", scratch, state=first.state)
    second.mirror = first.mirror
    second.oracle = OrtProgram(video.graphs["recache"], video.weights, first.mirror)
    for made, name in ((first, "denoise"), (second, "recache"), (first, "denoise"), (second, "short")):
        made.check(video.feeds[name])
    buffers = {made.program._context.scratch for made in (first, second)}
    assert buffers == {(scratch.use().address, 1000)}
    with pytest.raises(ProgramError, match="has 1000 bytes and is in use, the engine needs 2000"):
        scratch.reserve(2000)
    scratch.reserve(500)


def test_one_engine_serves_several_states(video: Video) -> None:
    made = Made(video, "denoise")
    count = len(made.device.buffers)
    state = tensors(video.infos["denoise"], torch.Generator().manual_seed(9))
    mirror = {name: value.numpy().copy() for name, value in state.items()}
    twin, oracle = made.program.over(state), made.oracle.over(mirror)
    assert len(made.device.buffers) == count  # nothing but the context is new
    for _ in range(4):
        made.check(video.feeds["denoise"])
        want, have = oracle.run(video.feeds["denoise"]), twin.run(video.feeds["denoise"])
        np.testing.assert_array_equal(have["flow"], want["flow"])
        for name, value in state.items():
            np.testing.assert_array_equal(value.numpy(), mirror[name])


def test_on_the_device_nothing_is_copied_and_nothing_waits(video: Video) -> None:
    made = Made(video, "denoise")
    feeds = {name: torch.from_numpy(array.copy()) for name, array in video.feeds["denoise"].items()}
    want = made.oracle.run(video.feeds["denoise"])["flow"]
    flow = made.program.run_on_device(feeds)["flow"]
    assert not {"wait", "upload", "download", "copy back"} & set(made.device.calls)
    assert made.device.calls[0] == "after caller"
    assert made.device.calls[-1] == "before caller"
    assert flow.data_ptr() in [buffer.address for buffer in made.device.buffers]
    np.testing.assert_array_equal(flow.numpy(), want)
    feeds["latents"] = feeds["latents"].float()
    with pytest.raises(ProgramError, match=r"input 'latents' must be contiguous float16\["):
        made.program.run_on_device(feeds)


def test_feeds_are_checked_before_anything_happens(video: Video) -> None:
    made = Made(video, "recache")
    feeds = dict(video.feeds["recache"])
    with pytest.raises(FeedError, match="input 'latents' must be float16"):
        made.program.run(feeds | {"latents": feeds["latents"].astype(np.float32)})
    assert made.device.calls == []
    many = {name: np.repeat(feeds[name], 2, 0) for name in ("latents", "sinusoids", "time", "places")}
    with pytest.raises(ProgramError, match=r"input '\w+' \[18, .*is larger than the plan allows"):
        made.program.run(feeds | many)
    made.program._context.refuse = {"enqueue"}
    with pytest.raises(ProgramError, match="plan: TensorRT refuses the step"):
        made.program.run(feeds)


def test_state_that_does_not_fit_is_refused_by_name(video: Video) -> None:
    info = video.infos["denoise"]
    good = tensors(info, torch.Generator())
    first, second = list(good)[:2]
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({name: value for name, value in good.items() if name != first}, f"state '{first}' is missing"),
        (good | {"more": torch.zeros(1)}, "state 'more' is unknown"),
        (good | {first: good[first].float()}, rf"state '{first}' must be float16\[.*\], not float32\["),
        (good | {first: good[first][:-1]}, f"state '{first}' must be float16"),
        (good | {second: good[first]}, f"state '{second}' shares memory with state '{first}'"),
        (good | {first: good[first].transpose(0, 1).contiguous().transpose(0, 1)}, "must be contiguous"),
    ]
    device = HostDevice()
    plan = Engine(device, video.graphs["denoise"], video.weights).loaded()
    for state, message in wrong:
        with pytest.raises(ProgramError, match=message):
            TensorrtProgram(plan, info, state, scratch=Scratch(device))


def test_an_engine_of_another_graph_is_refused(video: Video) -> None:
    device = HostDevice()
    engine = Engine(device, video.graphs["denoise"], video.weights)
    with pytest.raises(
        ProgramError, match=r"plan: tensor '.*' is in the graph or in the engine, not in both"
    ):
        bindings_of("plan", engine, video.infos["recache"])
    wide = read_graph(BUNDLE.graph("denoise", "float32").read_bytes())
    with pytest.raises(ProgramError, match="is float32 in the graph, HALF in the engine"):
        bindings_of("plan", engine, wide)
    engine.location = "TensorLocation.HOST"
    with pytest.raises(ProgramError, match="decides shapes"):
        bindings_of("plan", engine, video.infos["denoise"])
    engine.location = "TensorLocation.DEVICE"
    engine.output_bytes["flow"] = -1
    state = tensors(video.infos["denoise"], torch.Generator())
    with pytest.raises(ProgramError, match="the size of output 'flow' depends on values"):
        TensorrtProgram(engine.loaded(), video.infos["denoise"], state, scratch=Scratch(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_there_is_one_sentence() -> None:
    with pytest.raises(ProgramError, match=r"^PyTorch \S+ sees no CUDA device 0$"):
        CudaDevice()
