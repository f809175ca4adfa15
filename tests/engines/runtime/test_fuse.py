"""Fused projections give what the separate ones do, on golden cases of the releases too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from realtide.engines.easycontrol import replay as image_replay
from realtide.engines.easycontrol import torch_programs as image_programs
from realtide.engines.longlive import replay as video_replay
from realtide.engines.longlive import torch_programs as video_programs
from realtide.engines.runtime.fuse import fused

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_lie_side_by_side(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias) for width in (2, 5, 3)]
    x = torch.randn(4, 6)
    torch.testing.assert_close(fused(layers)(x), torch.cat([layer(x) for layer in layers], -1))


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="different inputs"):
        fused([nn.Linear(2, 2), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match="all layers to be fused have a bias or none"):
        fused([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])


@pytest.mark.parametrize(
    ("case", "replay", "programs"),
    [
        ("longlive/relative_rope_static", video_replay, video_programs),
        ("easycontrol/subject_and_spatial", image_replay, image_programs),
    ],
)
def test_golden_cases(case: str, replay: Any, programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays fuse what they load, as serving does."""
    make, made = programs.transformer, []

    def loading(*args: Any) -> nn.Module:
        model: Any = make(*args)
        made.append((model, len(model.state_dict())))
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(programs, "transformer", loading)
    report = replay.replay(GOLDEN / f"{case}.safetensors")
    assert report.ok
    assert made
    assert all(len(model.state_dict()) < before for model, before in made)
