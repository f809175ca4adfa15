"""The timed models at full size, on tensors without memory: shapes and types fit, and so do the floors."""

from __future__ import annotations

import pytest
import torch

from realtide.gpu import images, timing, video
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
