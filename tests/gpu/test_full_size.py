"""The timed models at full size, on tensors without memory: shapes and types fit, and so do the floors."""

from __future__ import annotations

import pytest
import torch

from realtide.engines.ancat.config import static_lanes, static_shapes
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.torch_programs import device_programs
from realtide.gpu import images, speech, timing, video
from realtide.gpu.bench import Bench
from realtide.gpu.timing import Clock, Rates


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(timing, "_WARM_UP", 0)
    monkeypatch.setattr(Bench, "seconds", 0.0)
    device = torch.device("meta")
    return Bench(device, torch.bfloat16, False, Clock(device, least=1), Rates(1e15, 1e12))


def test_video(bench: Bench) -> None:
    stream = video._Stream(bench, *video.config(small=False), False)
    passes = {name: kinds["eager"] for name, kinds in stream.passes().items()}
    # 4,680 tokens of a block through 1.2 billion weights, and their attention to 18,720: some 28 TFLOP.
    assert passes["denoise"]["operations"] == pytest.approx(28.3e12, rel=0.01)
    assert passes["recache"]["operations"] == pytest.approx(3 * passes["clean"]["operations"], rel=1e-3)
    assert sum(tensor.nbytes for tensor in stream.state) == 60 * 18_720 * 1536 * 2


@pytest.mark.parametrize("size", images.SIZES)
def test_images(bench: Bench, size: str) -> None:
    steps = images.run(bench, False, size)["steps"]
    plain, one, two = (
        steps[name]["eager"]["operations"] for name in ("plain", "one_condition", "two_conditions")
    )
    assert plain < one < two
    assert two - one == one - plain


@pytest.mark.parametrize(("size", "parameters"), [("30M", 30e6), ("100M", 100e6)])
def test_speech(size: str, parameters: float) -> None:
    config, streams, frames = speech.config(size, small=False), 64, 16
    with torch.device("meta"):
        model = Transducer(config)
        state = {
            name: torch.zeros((streams + 1) * rows, *shape, dtype=getattr(torch, dtype))
            for name, (rows, shape, dtype) in static_shapes(config, frames).items()
        }
        lanes, ints = static_lanes(frames), torch.zeros(streams, dtype=torch.int64)
        windows = torch.zeros(streams, lanes, config.window, config.mel_bins)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("ctc."))
    assert count == pytest.approx(parameters, rel=0.1)
    encoder, joiner = device_programs(model, frames, state, record=False)
    names = ("fresh", "slots", "arrived", "cap", "final")
    made = encoder.run({"windows": windows, "least": ints.float(), **dict.fromkeys(names, ints)})
    assert made["encoded"].shape == (streams, lanes, config.joiner_dim)
    scores = joiner.run({"encoded": made["encoded"][:, 0], "contexts": torch.stack([ints, ints], 1)})
    assert scores["log_probs"].shape == (streams, config.vocab)
