"""The static step equals the literal encoder, and leaves in the rings what the other step does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, static_shapes
from realtide.engines.ancat.stream_positions import Positions
from tests.engines.ancat.oracle import Dial, Oracle, small_config, wild
from tests.engines.ancat.static_driver import StaticDriver
from tests.engines.ancat.test_stream import BIASES, CLOSE, RULES, Driver, changing, run, some_windows, worst


@pytest.mark.parametrize("cap", [NO_CAP, 3, 0])
@pytest.mark.parametrize(("rule", "right"), RULES)
def test_every_batching_equals_the_literal_encoder(rule: str, right: int, cap: int) -> None:
    config = small_config(rule=rule, right=right)
    model = wild(config)
    windows = some_windows(config, 4)
    dials = [Dial(bias, cap) for bias in BIASES]
    truth = [Oracle(model.encoder).feed(w, d, final=True) for w, d in zip(windows, dials, strict=True)]
    for step_frames, lanes, chunk, seed in ((8, 8, 8, 1), (8, 4, 3, 2), (8, 3, 8, 3), (1, 1, 1, 4)):
        make = partial(StaticDriver, lanes=lanes)
        driver = run(model, windows, dials, step_frames, chunk, seed, make)
        for oracle, rows, available in zip(truth, driver.rows, driver.available, strict=True):
            assert available == oracle.available
            assert worst(torch.stack(rows), oracle.output) < CLOSE


@pytest.mark.parametrize(("step_frames", "lanes"), [(1, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("rule", ["adaptive", "layerwise"])
def test_turning_the_dial_while_it_runs(rule: str, step_frames: int, lanes: int) -> None:
    config = small_config(rule=rule)
    model = wild(config)
    windows = some_windows(config, 1, seed=2)[0][:45]
    oracle = Oracle(model.encoder).feed(windows, changing, final=True)
    driver = StaticDriver(model, step_frames, 1, lanes)
    while driver.fed[0] < len(windows):
        at = driver.fed[0]
        end = min(len(windows), at + step_frames, (at // 7 + 1) * 7)
        driver.call({0: windows[at:end]}, {0: changing(at)}, {0} if end == len(windows) else set())
    assert driver.available[0] == oracle.available
    assert worst(driver.output(0), oracle.output) < CLOSE


def test_flushing_and_finishing_without_new_frames() -> None:
    config = small_config()
    model = wild(config)
    windows = some_windows(config, 1)[0]
    oracle = Oracle(model.encoder).feed(windows[:11], Dial(3.0), final=True)
    oracle.feed(windows[11:], Dial(3.0), final=True)
    driver = StaticDriver(model, 4, 1)
    for start, end in ((0, 4), (4, 8), (8, 11), (11, 11), (11, 15)):
        driver.call({0: windows[start:end]}, {0: Dial(3.0)}, {0} if start == end else set())
    assert len(driver.rows[0]) >= 11
    for start in range(15, len(windows), 3):
        driver.call({0: windows[start : start + 3]}, {0: Dial(3.0)})
    driver.call({0: windows[:0]}, {0: Dial(3.0)}, {0})
    assert driver.available[0] == oracle.available
    assert worst(driver.output(0), oracle.output) < CLOSE


@pytest.mark.parametrize(("rule", "right"), RULES)
def test_the_rings_hold_what_the_other_step_leaves_there(rule: str, right: int) -> None:
    """Counts are the same, and so is every row that is read again, whatever stands beyond."""
    config = small_config(rule=rule, right=right)
    model = wild(config)
    windows = some_windows(config, 1)[0]
    one, other = StaticDriver(model, 8, 1, lanes=4), Driver(model, 8, 1)
    names = list(static_shapes(config, 8))
    for start in range(0, 18, 3):
        for driver in (one, other):
            driver.call({0: windows[start : start + 3]}, {0: Dial(0.5)})
        mine, theirs = (dict(zip(names, driver.state, strict=True)) for driver in (one, other))
        assert mine["counts"][0].tolist() == theirs["counts"][0].tolist()
        assert mine["newest"][0].tolist() == theirs["newest"][0].tolist()
        for name, rows in read_again(config, mine["counts"][0].tolist(), start + 3).items():
            if rows:
                assert worst(mine[name][rows].double(), theirs[name][rows].double()) < CLOSE


def read_again(config: EncoderConfig, counts: list[int], arrived: int) -> dict[str, list[int]]:
    """Rows of slot 0 that a later call reads, by ring."""
    rows: dict[str, list[int]] = {}
    long, short = config.long_ring(8), config.short_ring(8)
    for layer, (done, inputs) in enumerate(zip(counts, [arrived, *counts], strict=False)):
        keys = [p % long for p in range(max(0, done - config.left), inputs)]
        for name in ("key", "value"):
            rows[f"{name}_{layer}"] = [h * long + p for h in range(config.heads) for p in keys]
        rows[f"conv_{layer}"] = [p % short for p in range(done - config.kernel + 1, done)]
        if config.rule != "causal":
            for name in ("residual", "depth", "available"):
                rows[f"{name}_{layer}"] = [p % short for p in range(done, inputs)]
    return rows


@pytest.mark.parametrize("lanes", [0, 9])
def test_lanes_are_bounded_by_what_the_rings_have_room_for(lanes: int) -> None:
    with pytest.raises(ValueError, match=r"lanes must be in 1\.\.8 \(step_frames\), got"):
        Positions(small_config(), 8, lanes, torch.int64)
