"""The streaming step equals the literal encoder and the offline one, however frames are cut and batched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, state_shapes, threshold
from realtide.engines.ancat.latency import availability, cap_depths
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.offline import encode, given_arcs, hard_arcs, hard_depth
from realtide.engines.ancat.stream import StreamStep
from tests.engines.ancat.oracle import Dial, Oracle, small_config, wild

RULES = [("adaptive", 4), ("causal", 0), ("layerwise", 2), ("chunked", 3)]
BIASES = (0.0, 0.5, -1.0, 3.0)
CLOSE = 1e-4


class Driver:
    """Streams in slots of their own, advanced together in calls of any composition."""

    def __init__(self, model: Transducer, step_frames: int, slots: int) -> None:
        self.config, self.step_frames = model.config, step_frames
        self.step = StreamStep(model.encoder, step_frames)
        self.state = [
            torch.zeros(slots * rows, *shape, dtype=getattr(torch, dtype))
            for rows, shape, dtype in state_shapes(model.config, step_frames).values()
        ]
        self.fed = [0] * slots
        self.rows: list[list[Tensor]] = [[] for _ in range(slots)]
        self.available: list[list[int]] = [[] for _ in range(slots)]
        self.repeats = 0

    @torch.no_grad()
    def call(self, news: dict[int, Tensor], dials: dict[int, Dial], final: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Feed windows [n, 7, mel] by slot, and call again for streams whose burst did not fit."""
        active = list(news)
        windows = torch.cat([news[slot] for slot in active])
        stream = torch.cat([torch.full((len(news[s]),), b) for b, s in enumerate(active)])
        position = torch.cat([torch.arange(self.fed[s], self.fed[s] + len(news[s])) for s in active])
        for slot in active:
            self.fed[slot] += len(news[slot])
        while active:
            encoded, owner, at, available, more, *_ = self.step(
                windows,
                stream.long(),
                position.long(),
                torch.tensor(active),
                torch.tensor([self.fed[s] for s in active]),
                torch.tensor([threshold(dials[s].bias) for s in active]),
                torch.tensor([dials[s].cap for s in active]),
                torch.tensor([int(s in final) for s in active]),
                *self.state,
            )
            for row, b, i, a in zip(encoded, owner.tolist(), at.tolist(), available.tolist(), strict=True):
                assert i == len(self.rows[active[b]])  # in order, none twice, none left out
                self.rows[active[b]].append(row)
                self.available[active[b]].append(a)
            active = [s for s, again in zip(active, more.tolist(), strict=True) if again]
            windows, stream, position = windows[:0], stream[:0], position[:0]
            self.repeats += bool(active)

    def output(self, slot: int) -> Tensor:
        """Rows [T, J] of a stream so far."""
        return torch.stack(self.rows[slot])


def some_windows(config: EncoderConfig, count: int, seed: int = 5) -> list[Tensor]:
    """Random streams of different lengths."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(n) for n in rng.integers(18, 50, count)]
    return [torch.randn(n, config.window, config.mel_bins, generator=generator) for n in sizes]


def run(
    model: Transducer,
    windows: Sequence[Tensor],
    dials: Sequence[Dial],
    step_frames: int,
    chunk: int,
    seed: int,
    make: Callable[[Transducer, int, int], Driver] = Driver,
) -> Driver:
    """Random calls: each stream is in a call or not, with 0 to `chunk` new frames, and ends when it ends."""
    rng = random.Random(seed)
    driver = make(model, step_frames, len(windows) + 1)
    slots = rng.sample(range(len(windows) + 1), len(windows))
    while any(driver.fed[s] < len(w) for s, w in zip(slots, windows, strict=True)):
        news, final = {}, set()
        for slot, w in zip(slots, windows, strict=True):
            at = driver.fed[slot]
            if at == len(w) or rng.random() > 0.7:
                continue
            end = min(len(w), at + rng.randint(0, min(chunk, step_frames)))
            news[slot] = w[at:end]
            if end == len(w):
                final.add(slot)
        if news:
            driver.call(news, dict(zip(slots, dials, strict=True)), final)
    driver.rows = [driver.rows[s] for s in slots]
    driver.available = [driver.available[s] for s in slots]
    return driver


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("cap", [NO_CAP, 3, 0])
@pytest.mark.parametrize(("rule", "right"), RULES)
def test_every_batching_equals_the_literal_encoder(rule: str, right: int, cap: int) -> None:
    config = small_config(rule=rule, right=right)
    model = wild(config)
    windows = some_windows(config, 4)
    dials = [Dial(bias, cap) for bias in BIASES]
    truth = [Oracle(model.encoder).feed(w, d, final=True) for w, d in zip(windows, dials, strict=True)]
    for step_frames, chunk, seed in ((8, 8, 1), (8, 1, 2), (2, 2, 3), (1, 1, 4), (8, 3, 5)):
        driver = run(model, windows, dials, step_frames, chunk, seed)
        for oracle, rows, available in zip(truth, driver.rows, driver.available, strict=True):
            assert available == oracle.available
            assert worst(torch.stack(rows), oracle.output) < CLOSE


def test_arcs_trained_independently_stream_as_the_offline_encoder_has_them() -> None:
    config = small_config(span=False)
    model = wild(config)
    windows = some_windows(config, 4)
    driver = run(model, windows, [Dial(bias) for bias in BIASES], 8, 5, 6)
    gaps = 0
    for w, bias, rows in zip(windows, BIASES, driver.rows, strict=True):
        with torch.no_grad():
            out = encode(model.encoder, w[None], torch.tensor([len(w)]), hard_arcs(config, bias))
            _, _, _, scores = model.encoder.blocks[0].arrive(model.encoder.subsample(w))  # type: ignore[operator]
        assert worst(torch.stack(rows), out.rows[0]) < CLOSE
        leading, last = (hard_depth(scores, threshold(bias), is_span=span) for span in (True, False))
        gaps += int((last > leading).sum())
    assert gaps  # there were arcs that no span would have


@pytest.mark.parametrize(("rule", "right"), RULES)
def test_the_literal_encoder_equals_the_offline_one(rule: str, right: int) -> None:
    config = small_config(rule=rule, right=right)
    model = wild(config)
    spread = set()
    for windows, bias in zip(some_windows(config, 4), BIASES, strict=True):
        oracle = Oracle(model.encoder).feed(windows, Dial(bias), final=True)
        with torch.no_grad():
            out = encode(model.encoder, windows[None], torch.tensor([len(windows)]), hard_arcs(config, bias))
        assert worst(oracle.output, out.rows[0]) < CLOSE
        depths = out.arcs[0].sum(-1).long().numpy()
        if rule != "causal":
            np.testing.assert_array_equal(depths, oracle.wanted)
            assert oracle.available == availability(depths)[-1].tolist()
        spread |= {depth for layer in oracle.wanted for depth in layer}
    if rule == "adaptive":
        assert spread == set(range(right + 1))  # every depth was tried


@pytest.mark.parametrize("cap", [NO_CAP, 0, 1, 3, 5, 9])
@pytest.mark.parametrize(("rule", "right"), RULES)
def test_availability_is_the_exact_definition(rule: str, right: int, cap: int) -> None:
    config = small_config(rule=rule, right=right)
    model = wild(config)
    for windows, bias in zip(some_windows(config, 3, seed=9), BIASES, strict=False):
        oracle = Oracle(model.encoder).feed(windows, Dial(bias, cap), final=True)
        effective, available = cap_depths(np.array(oracle.wanted), cap)
        np.testing.assert_array_equal(effective, oracle.used)
        inside = np.array([layer.available for layer in oracle.layers])
        np.testing.assert_array_equal(available[1:], np.minimum(inside, len(windows) - 1))
        assert available[-1].tolist() == oracle.available
        assert max(a - i for i, a in enumerate(oracle.available)) <= cap
        arcs = given_arcs(torch.from_numpy(effective)[None], right)
        with torch.no_grad():
            out = encode(model.encoder, windows[None], torch.tensor([len(windows)]), arcs)
        assert worst(oracle.output, out.rows[0]) < CLOSE


def test_a_burst_that_does_not_fit_is_worked_off_in_further_calls() -> None:
    config = small_config(rule="chunked", right=7, layers=2)
    model = wild(config)
    windows = some_windows(config, 1)[0][:16]
    driver = Driver(model, 3, 1)
    for k in range(0, 16, 2):
        driver.call({0: windows[k : k + 2]}, {0: Dial()}, {0} if k == 14 else set())
        # A chunk of 8 frames ends with every fourth call: in both layers 8 nodes are ready, and 3 fit.
        assert driver.repeats == 4 * ((k + 2) // 8)
        assert len(driver.rows[0]) == (k + 2) // 8 * 8
    oracle = Oracle(model.encoder).feed(windows, Dial(), final=True)
    assert driver.available[0] == oracle.available == [7] * 8 + [15] * 8
    assert worst(driver.output(0), oracle.output) < CLOSE


def test_nothing_is_resolved_later_or_earlier_than_its_availability() -> None:
    config = small_config()
    model = wild(config)
    windows = some_windows(config, 1)[0]
    driver = Driver(model, 8, 1)
    for k, window in enumerate(windows):
        before = len(driver.rows[0])
        driver.call({0: window[None]}, {0: Dial(cap=5)}, {0} if k == len(windows) - 1 else set())
        assert driver.available[0][before:] == [k] * (len(driver.rows[0]) - before)


def changing(frame: int) -> Dial:
    """A dial that is turned five times, up and down, far enough to strand nodes beyond the new cap."""
    turns = [Dial(6.0), Dial(6.0, 0), Dial(-1.0, 7), Dial(6.0), Dial(1.0, 1), Dial(0.0, 4)]
    return turns[min(frame // 7, len(turns) - 1)]


@pytest.mark.parametrize("step_frames", [1, 2, 8])
@pytest.mark.parametrize("rule", ["adaptive", "layerwise"])
def test_turning_the_dial_while_it_runs(rule: str, step_frames: int) -> None:
    config = small_config(rule=rule)
    model = wild(config)
    windows = some_windows(config, 1, seed=2)[0][:45]
    oracle = Oracle(model.encoder).feed(windows, changing, final=True)
    driver = Driver(model, step_frames, 1)
    while driver.fed[0] < len(windows):
        at = driver.fed[0]
        end = min(len(windows), at + step_frames, (at // 7 + 1) * 7)  # the session cuts at controls
        driver.call({0: windows[at:end]}, {0: changing(at)}, {0} if end == len(windows) else set())
    assert driver.available[0] == oracle.available
    assert worst(driver.output(0), oracle.output) < CLOSE
    for i, available in enumerate(driver.available[0]):
        # It went on waiting only while the cap then in force allowed it.
        assert available == i or available <= i + changing(available - 1).cap
    arcs = given_arcs(torch.tensor(oracle.used)[None], config.right)
    with torch.no_grad():
        out = encode(model.encoder, windows[None], torch.tensor([len(windows)]), arcs)
    assert worst(driver.output(0), out.rows[0]) < CLOSE


def test_flushing_resolves_with_what_exists_and_the_stream_goes_on() -> None:
    config = small_config()
    model = wild(config)
    windows = some_windows(config, 1)[0]
    oracle = Oracle(model.encoder).feed(windows[:11], Dial(3.0), final=True)
    oracle.feed(windows[11:], Dial(3.0), final=True)
    driver = Driver(model, 4, 1)
    for start, end in ((0, 4), (4, 8), (8, 11), (11, 15)):
        driver.call({0: windows[start:end]}, {0: Dial(3.0)}, {0} if end == 11 else set())
        if end == 11:
            assert len(driver.rows[0]) == 11
    for start in range(15, len(windows), 3):
        last = start + 3 >= len(windows)
        driver.call({0: windows[start : start + 3]}, {0: Dial(3.0)}, {0} if last else set())
    assert driver.available[0] == oracle.available
    assert worst(driver.output(0), oracle.output) < CLOSE


def test_finishing_without_new_frames() -> None:
    config = small_config()
    model = wild(config)
    windows = some_windows(config, 1)[0][:8]
    driver = Driver(model, 8, 1)
    driver.call({0: windows}, {0: Dial(6.0)})
    assert driver.rows[0] == []  # every arc is open and 12 frames ahead do not exist
    driver.call({0: windows[:0]}, {0: Dial(6.0)}, {0})
    assert driver.available[0] == [7] * 8
    assert worst(driver.output(0), Oracle(model.encoder).feed(windows, Dial(6.0), final=True).output) < CLOSE


@pytest.mark.parametrize(("bias", "depth"), [(6.0, 4), (20.0, 4), (-6.0, 0), (-20.0, 0)])
def test_the_ends_of_the_dial_open_all_arcs_or_none(bias: float, depth: int) -> None:
    config = small_config()
    model = wild(config)
    windows = some_windows(config, 1)[0]
    driver = Driver(model, 8, 1)
    for start in range(0, len(windows), 8):
        last = start + 8 >= len(windows)
        driver.call({0: windows[start : start + 8]}, {0: Dial(bias)}, {0} if last else set())
    want = availability(np.full((config.layers, len(windows)), depth))[-1]
    assert driver.available[0] == want.tolist()


def test_a_slot_is_used_again_after_being_zeroed() -> None:
    config = small_config()
    model = wild(config)
    first, second = some_windows(config, 2)
    driver = Driver(model, 8, 1)
    alone: Callable[[Tensor], Oracle] = lambda w: Oracle(model.encoder).feed(w, Dial(), final=True)  # noqa: E731
    for windows in (first, second):
        driver.fed, driver.rows, driver.available = [0], [[]], [[]]
        for array in driver.state:
            array.zero_()
        for start in range(0, len(windows), 8):
            last = start + 8 >= len(windows)
            driver.call({0: windows[start : start + 8]}, {0: Dial()}, {0} if last else set())
        assert worst(driver.output(0), alone(windows).output) < CLOSE
