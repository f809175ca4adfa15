"""Exact latency definitions against brute force over the dependency graph and a literal processor."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from realtide.engines.ancat.latency import (
    Ints,
    Report,
    algorithmic_latency,
    availability,
    cap_depths,
    clip_depths,
    depths_from_arcs,
    schedule,
    simulate,
)

quick = settings(max_examples=150, deadline=None)


def depth_arrays(layers: int = 4, steps: int = 9, most: int = 4) -> st.SearchStrategy[Ints]:
    """Random depths [L, T]."""
    shapes = st.tuples(st.integers(1, layers), st.integers(1, steps))
    return shapes.flatmap(lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, most)))


def graph_availability(depths: Ints, left: int, *, in_order: bool) -> Ints:
    """Newest input frame among all ancestors, by walking the graph with no recursion over maxima.

    Node (l, i) reads (l - 1, i - left .. i + depth) and, in order, also (l, i - 1).
    """
    layers, steps = depths.shape
    result = np.zeros((layers + 1, steps), np.int64)
    for layer in range(layers + 1):
        for i in range(steps):
            seen: set[tuple[int, int]] = set()
            stack = [(layer, i)]
            while stack:
                node = stack.pop()
                if node in seen:
                    continue
                seen.add(node)
                at, frame = node
                if at == 0:
                    continue
                last = min(frame + int(depths[at - 1, frame]), steps - 1)
                stack += [(at - 1, j) for j in range(max(0, frame - left), last + 1)]
                if in_order and frame > 0:
                    stack.append((at, frame - 1))
            result[layer, i] = max(frame for at, frame in seen if at == 0)
    return result


@given(depth_arrays(), st.integers(1, 3))
@quick
def test_in_order_recursion_equals_all_past_and_future_arcs(depths: Ints, left: int) -> None:
    np.testing.assert_array_equal(availability(depths), graph_availability(depths, left, in_order=True))


@given(depth_arrays(), st.integers(0, 3))
@quick
def test_future_only_form_is_a_lower_bound_and_equal_once_outputs_leave_in_order(
    depths: Ints, left: int
) -> None:
    exact = availability(depths)
    future_only = graph_availability(depths, left, in_order=False)
    assert (future_only <= exact).all()
    # The search reads encoder outputs in order; for it, working in order inside the layers costs nothing.
    np.testing.assert_array_equal(np.maximum.accumulate(future_only, axis=1), exact)


def test_future_only_form_can_be_strictly_lower() -> None:
    depths = np.array([[3, 0, 0, 0]])
    assert graph_availability(depths, 0, in_order=False)[1].tolist() == [3, 1, 2, 3]
    assert availability(depths)[1].tolist() == [3, 3, 3, 3]
    assert algorithmic_latency(depths).tolist() == [3, 2, 1, 0]


@given(depth_arrays(layers=3, steps=7), st.integers(0, 4), st.data())
@quick
def test_padding_is_the_end_of_the_utterance(depths: Ints, pad: int, data: st.DataObject) -> None:
    layers, steps = depths.shape
    tail = data.draw(hnp.arrays(np.int64, (layers, pad), elements=st.integers(0, 4)))
    padded = np.concatenate((depths, tail), 1)
    batch = np.stack((padded, padded))
    full = steps + pad
    a = availability(batch, np.array([steps, full]))
    np.testing.assert_array_equal(a[0, :, :steps], availability(depths))
    np.testing.assert_array_equal(a[1], availability(padded))
    assert (a[0, :, steps:] == np.arange(steps, full)).all()
    clipped = clip_depths(batch, np.array([steps, full]))
    assert (clipped[0, :, steps:] == 0).all()


@given(depth_arrays(), st.data())
@quick
def test_more_lookahead_never_lowers_latency(depths: Ints, data: st.DataObject) -> None:
    more = depths + data.draw(hnp.arrays(np.int64, depths.shape, elements=st.integers(0, 2)))
    assert (algorithmic_latency(more) >= algorithmic_latency(depths)).all()


def brute_cap(depths: Ints, cap: int) -> tuple[Ints, Ints]:
    """The definition read out loud, node by node."""
    layers, steps = depths.shape
    a = np.zeros((layers + 1, steps), np.int64)
    a[0] = np.arange(steps)
    e = np.zeros_like(depths)
    for layer in range(layers):
        for i in range(steps):
            fits = [
                k for k in range(int(depths[layer, i]) + 1) if i + k < steps and a[layer, i + k] <= i + cap
            ]
            e[layer, i] = max(fits)
            a[layer + 1, i] = max(a[layer, i + max(fits)], a[layer + 1, i - 1] if i else 0)
            if max(fits) < int(depths[layer, i]):
                # It waited in vain, until its deadline or the end.
                a[layer + 1, i] = max(a[layer + 1, i], min(i + cap, steps))
    return e, np.minimum(a, steps - 1)


@given(depth_arrays(), st.integers(0, 6))
@quick
def test_cap_follows_its_definition_and_holds(depths: Ints, cap: int) -> None:
    effective, available = cap_depths(depths, cap)
    expected_depths, expected = brute_cap(depths, cap)
    np.testing.assert_array_equal(effective, expected_depths)
    np.testing.assert_array_equal(available, expected)
    assert (available - np.arange(depths.shape[1]) <= cap).all()
    assert (availability(effective) <= available).all()  # what is used is there before a node gives up
    assert (available[-1] <= availability(depths)[-1]).all()


@given(depth_arrays(), st.integers(0, 6))
@quick
def test_no_node_can_give_up_before_its_deadline(depths: Ints, cap: int) -> None:
    effective, _ = cap_depths(depths, cap)
    steps = depths.shape[1]
    for layer, i in zip(*np.nonzero(effective < clip_depths(depths)), strict=True):
        if effective[layer, i] < cap:
            # Had the stream ended just before the deadline, or had that frame asked for nothing, the node
            # would have used more: nothing seen until then settles its depth.
            deadline = int(i) + cap
            assert deadline < steps
            other = depths[:, : deadline + 1].copy()
            other[:, deadline] = 0
            missed = int(i + effective[layer, i]) + 1
            ended, _ = cap_depths(other if missed == deadline else other[:, :deadline], cap)
            assert ended[layer, i] > effective[layer, i]


@given(depth_arrays())
@quick
def test_a_wide_cap_changes_nothing_and_zero_is_causal(depths: Ints) -> None:
    effective, available = cap_depths(depths, depths.shape[1])
    np.testing.assert_array_equal(effective, clip_depths(depths))
    np.testing.assert_array_equal(available, availability(depths))
    causal, now = cap_depths(depths, 0)
    assert not causal.any()
    assert (now == np.arange(depths.shape[1])).all()


def test_cap_per_utterance() -> None:
    depths = np.full((2, 3, 8), 2)
    effective, available = cap_depths(depths, np.array([1, 4]), np.array([8, 6]))
    for b, (cap, length) in enumerate([(1, 8), (4, 6)]):
        alone = cap_depths(depths[b, :, :length], cap)
        np.testing.assert_array_equal(effective[b, :, :length], alone[0])
        np.testing.assert_array_equal(available[b, :, :length], alone[1])


def test_depth_is_the_farthest_arc_that_is_on() -> None:
    arcs = np.array([[0.0, 0.0, 0.0], [0.5, 0.4, 0.1], [0.9, 0.9, 0.5], [0.1, 0.8, 0.2]])
    assert depths_from_arcs(arcs).tolist() == [0, 1, 3, 2]
    assert depths_from_arcs(arcs, threshold=0.85).tolist() == [0, 0, 2, 0]
    assert depths_from_arcs(np.zeros((2, 0))).tolist() == [0, 0]


def literal_schedule(depths: Ints, arrival: list[int], cost: int) -> tuple[Ints, Ints]:
    """A processor that looks at every node of the graph each time it is free. Slow, with nothing clever."""
    layers, steps = depths.shape
    ready: dict[tuple[int, int], int] = {}
    finish: dict[tuple[int, int], int] = {(-1, i): t for i, t in enumerate(arrival)}
    free = 0
    nodes = [(layer, i) for layer in range(layers) for i in range(steps)]
    while len(ready) < len(nodes):
        waiting = []
        for layer, i in nodes:
            if (layer, i) in ready:
                continue
            inputs = [(layer - 1, min(i + int(depths[layer, i]), steps - 1))]
            inputs += [(layer, i - 1)] if i else []
            if all(n in finish for n in inputs):
                waiting.append((max(finish[n] for n in inputs), i, layer))
        since, i, layer = min(waiting)
        free = max(free, since) + cost
        ready[layer, i], finish[layer, i] = since, free
    shape = (layers, steps)
    return (
        np.array([ready[n] for n in nodes]).reshape(shape),
        np.array([finish[n] for n in nodes]).reshape(shape),
    )


@given(
    depth_arrays(layers=3, steps=7),
    st.integers(0, 12),
    st.lists(st.integers(0, 6), min_size=7, max_size=7),
)
@quick
def test_schedule_equals_a_literal_processor(depths: Ints, cost: int, gaps: list[int]) -> None:
    arrival = np.cumsum(gaps)[: depths.shape[1]]
    ready, finish = schedule(depths, arrival, cost)
    expected = literal_schedule(depths, arrival.tolist(), cost)
    np.testing.assert_array_equal(ready, expected[0])
    np.testing.assert_array_equal(finish, expected[1])


@given(depth_arrays())
@quick
def test_free_processor_leaves_only_algorithmic_latency(depths: Ints) -> None:
    simulation = simulate(depths, 0.0, 0.04)
    np.testing.assert_allclose(simulation.upl, algorithmic_latency(depths) * 0.04, atol=1e-9)


@given(depth_arrays(), st.floats(1e-4, 0.05))
@quick
def test_work_is_conserved(depths: Ints, cost: float) -> None:
    layers = depths.shape[0]
    result = simulate(depths, cost, 0.04)
    order = np.sort(result.finish.ravel())
    assert (np.diff(order) >= cost - 2e-9).all()
    assert (result.finish >= result.ready + cost - 2e-9).all()
    # At the least, a frame waits for its audio and then passes the top layer; the last one passes them all.
    floor = algorithmic_latency(depths) * 0.04 + cost
    assert (result.upl >= floor - 2e-9).all()
    assert result.upl[-1] >= layers * cost - 1e-8
    # Never idle while something waits: each start is a readiness or the end of another node.
    starts = np.rint((result.finish - cost).ravel() * 1e6)
    allowed = set(np.rint(np.concatenate((result.ready.ravel(), order)) * 1e6))
    assert all({s - 1, s, s + 1} & allowed for s in starts)


def test_backlog_bursts_up_when_the_awaited_frame_arrives() -> None:
    # Frames 0..2 all wait for frame 3 (at 4 s) and then queue; a causal encoder works them off one by one.
    burst = simulate(np.array([[3, 2, 1, 0]]), 0.5, 1.0)
    assert burst.finish.tolist() == [[4.5, 5.0, 5.5, 6.0]]
    assert burst.upl.tolist() == [3.5, 3.0, 2.5, 2.0]
    causal = simulate(np.zeros((1, 4), int), 0.5, 1.0)
    assert causal.upl.tolist() == [0.5] * 4


def test_overload_grows_without_bound() -> None:
    upl = simulate(np.zeros((4, 50), int), 0.02, 0.04).upl  # 80 ms of work per 40 ms of audio
    assert upl[-1] == pytest.approx(50 * 0.08 - 49 * 0.04)


def test_given_arrivals() -> None:
    late = simulate(np.zeros((1, 3), int), 0.1, 1.0, arrival=[5.0, 5.0, 9.0])
    np.testing.assert_allclose(late.finish, [[5.1, 5.2, 9.1]])
    np.testing.assert_allclose(late.upl, [0.1, 0.2, 0.1])


def test_no_layers_and_no_frames() -> None:
    assert simulate(np.zeros((0, 3), int), 0.1, 1.0).upl.tolist() == [0, 0, 0]
    assert simulate(np.zeros((2, 0), int), 0.1, 1.0).finish.shape == (2, 0)
    assert availability(np.zeros((2, 0), int)).shape == (3, 0)
    assert availability(np.zeros((0, 2), int)).tolist() == [[0, 1]]


def test_report() -> None:
    report = Report.of(np.arange(101.0), frontend_ms=25.0)
    assert (report.frames, report.mean_ms, report.p50_ms, report.p90_ms, report.p99_ms) == (
        101,
        50,
        50,
        90,
        99,
    )
    total = report.with_frontend()
    assert (total.mean_ms, total.p99_ms, total.frontend_ms) == (75, 124, 0)
    depths = np.array([[[3, 0, 0, 0]], [[3, 0, 9, 9]]])
    assert Report.of_depths(depths, np.array([4, 2]), frame_ms=40.0).mean_ms == pytest.approx(40 * 7 / 6)
    assert Report.of_depths(depths[:1], frame_ms=40.0).mean_ms == pytest.approx(40 * 6 / 4)
    with pytest.raises(ValueError, match="no frames"):
        Report.of([])


def test_refuses() -> None:
    good = np.zeros((2, 3), int)
    for bad, message in ((good[0], "L, T"), (good + 0.5, "integers"), (good - 1, "negative")):
        with pytest.raises(ValueError, match=message):
            availability(bad)
    with pytest.raises(ValueError, match="lengths"):
        availability(np.zeros((2, 2, 3), int), [1, 4])
    with pytest.raises(ValueError, match="lengths"):
        availability(good, [3])
    for cap in (-1, 1.5):
        with pytest.raises(ValueError, match="cap"):
            cap_depths(good, cap)
    with pytest.raises(ValueError, match="one utterance"):
        schedule(np.zeros((1, 2, 3), int), np.arange(3), 1)
    with pytest.raises(ValueError, match="non-decreasing"):
        schedule(good, np.array([0, 2, 1]), 1)
    with pytest.raises(ValueError, match="cost"):
        simulate(good, -0.1, 1.0)


def test_the_documentation_is_true() -> None:
    page = Path(__file__).parents[3] / "docs" / "latency.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 15
    assert result.failed == 0
