"""Shapes and the dial's threshold."""

from __future__ import annotations

import math

import pytest
import torch

from realtide.engines.ancat.config import LOGIT_BOUND, EncoderConfig, state_shapes, threshold
from realtide.engines.ancat.model import keep_logits
from tests.engines.ancat.oracle import small_config


def test_a_manifest_brings_the_same_configuration_back() -> None:
    config = small_config(rule="chunked", right=7)
    assert EncoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field 'depth'"):
        EncoderConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "encoder.dim must be at least 1"),
        ({"layers": 0}, "encoder.layers"),
        ({"left": 0}, "encoder.left"),
        ({"vocab": -1}, "encoder.vocab"),
        ({"dim": 33}, r"encoder.dim \(33\) must be a multiple of encoder.heads \(2\)"),
        ({"right": -1}, "encoder.right"),
        ({"right": 0}, "encoder.right must be 0 for rule causal and at least 1 otherwise"),
        ({"rule": "causal"}, "encoder.right must be 0 for rule causal"),
        ({"rule": "guess"}, "encoder.rule"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


@pytest.mark.parametrize("bias", [-5.9, -2.0, 0.0, 0.3, 4.0, 5.9])
def test_the_threshold_is_where_the_biased_logit_changes_sign(bias: float) -> None:
    scores = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    opened = keep_logits(scores) + bias >= 0
    assert torch.equal(scores >= threshold(bias), opened)
    assert 0 < int(opened.sum()) < len(scores)


def test_beyond_the_dial_everything_is_open_or_closed() -> None:
    for bias in (LOGIT_BOUND, 50.0):
        assert threshold(bias) == -math.inf
        assert threshold(-bias) == math.inf


@pytest.mark.parametrize(("rule", "right"), [("adaptive", 4), ("causal", 0), ("layerwise", 2)])
def test_state_is_the_same_for_every_slot_and_bounded(rule: str, right: int) -> None:
    config = small_config(rule=rule, right=right)
    shapes = state_shapes(config, 8)
    assert shapes["counts"] == (1, (3,), "int64")
    assert shapes["key_2"][1:] == ((16,), "float32")  # of one head
    assert shapes["key_0"][0] >= 2 * (config.left + 8 + right)
    assert shapes["conv_0"][0] >= config.kernel - 1 + 8
    assert ("depth_0" in shapes) == (rule != "causal")  # nothing waits in a causal layer
    assert all(rows < 128 for rows, _, _ in shapes.values())
