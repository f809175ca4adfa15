"""Where frames lie in the cache, against a window that really moves."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.longlive import window
from realtide.engines.longlive.config import StreamConfig


@st.composite
def streams(draw: st.DrawFn) -> tuple[StreamConfig, int]:
    block = draw(st.integers(1, 4))
    sink = draw(st.integers(0, 5))
    size = sink + draw(st.integers(block, 9))
    config = StreamConfig(block=block, window=size, sink=sink, global_sink=draw(st.booleans()))
    return config, block * draw(st.integers(1, 12))


@given(streams())
def test_a_ring_holds_what_a_moving_window_would(case: tuple[StreamConfig, int]) -> None:
    config, end = case
    held = np.full(config.window, -1)
    moving: list[int] = []
    for first in range(0, end, config.block):
        frames = np.arange(first, first + config.block)
        held[window.places(config, first, config.block)] = frames
        moving += list(frames)
        if len(moving) > config.window:
            moving[config.sink :] = moving[len(moving) - (config.window - config.sink) :]
    assert list(held[window.order(config, end)]) == moving
    np.testing.assert_array_equal(window.seen(config, end), held >= 0)
    ranks = window.ranks(config, end)
    assert [moving[ranks[place]] for place in np.flatnonzero(held >= 0)] == list(held[held >= 0])


@given(streams())
def test_a_recache_writes_every_place_it_should(case: tuple[StreamConfig, int]) -> None:
    config, end = case
    replay = window.recache(config, end)
    frames = np.arange(replay.first, replay.first + replay.frames)
    assert frames[-1] == end - 1
    assert len(set(replay.places)) == replay.frames
    moved = end > config.window
    sink = np.arange(min(config.sink, end))
    written = set(replay.places)
    assert written | set(sink) == set(np.flatnonzero(window.seen(config, end)))
    assert bool(written & set(sink)) == (bool(config.sink) and not (moved and config.global_sink))
    ring = replay.places >= config.sink
    np.testing.assert_array_equal(
        replay.places[ring], [window.places(config, frame, 1)[0] for frame in frames[ring]]
    )


def test_the_released_setting() -> None:
    config = StreamConfig()
    assert list(window.places(config, 9, 6)) == [9, 10, 11, 3, 4, 5]
    assert list(window.order(config, 15)) == [0, 1, 2, 6, 7, 8, 9, 10, 11, 3, 4, 5]
    replay = window.recache(config, 18)
    assert (replay.first, list(replay.places)) == (9, [9, 10, 11, 3, 4, 5, 6, 7, 8])
    replay = window.recache(StreamConfig(global_sink=False), 18)
    assert (replay.first, list(replay.places)) == (6, [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8])
    assert window.recache(config, 9).frames == 9
