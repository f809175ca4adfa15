"""Loading weights into modules."""

from __future__ import annotations

import numpy as np
import pytest

from realtide.engines.longlive.torch_programs import transformer
from tests.engines.longlive.conftest import Player, video_config


def test_weights_that_do_not_fit_are_named() -> None:
    player = Player(video_config())
    config = player.config.transformer
    weights = {name: value.numpy() for name, value in player.model.state_dict().items()}
    loaded = transformer(config, weights).state_dict()
    assert all(np.array_equal(loaded[name], value) for name, value in weights.items())
    missing = {name: value for name, value in weights.items() if name != "head.head.bias"}
    with pytest.raises(ValueError, match=r"lack 'head\.head\.bias'$"):
        transformer(config, missing)
    with pytest.raises(ValueError, match=r"have 'extra', which the model has not \(and 1 more differences\)"):
        transformer(config, weights | {"extra": np.zeros(1), "more": np.zeros(1)})
    with pytest.raises(ValueError, match=r"'head\.head\.bias' is \[3\], not \[16\]"):
        transformer(config, weights | {"head.head.bias": np.zeros(3)})
