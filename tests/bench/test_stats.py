from __future__ import annotations

import math

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from realtide.bench import stats
from realtide.bench.stats import Gained, Reading


def test_a_summary_has_percentiles_in_milliseconds() -> None:
    found = stats.summary(np.arange(101) / 1000)
    assert found == {
        "count": 101,
        "mean_ms": 50.0,
        "p50_ms": 50.0,
        "p95_ms": 95.0,
        "p99_ms": 99.0,
        "max_ms": 100.0,
    }


def test_a_summary_of_nothing_has_no_figures() -> None:
    found = stats.summary([])
    assert found.pop("count") == 0
    assert set(found.values()) == {None}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def read(registry: CollectorRegistry) -> Reading:
    return Reading.parse(generate_latest(registry).decode())


def test_what_a_histogram_gained_is_the_difference_of_two_readings(registry: CollectorRegistry) -> None:
    histogram = Histogram("t_seconds", "", ("stage",), buckets=(0.1, 0.2, 0.4), registry=registry)
    for _ in range(50):
        histogram.labels("a").observe(0.01)
    before = read(registry)
    for value in (0.15, 0.15, 0.3, 0.3):
        histogram.labels("a").observe(value)
    histogram.labels("b").observe(9.0)
    after = read(registry)
    gained = Gained.between(before, after, "t_seconds", stage="a")
    assert gained.count == 4
    assert gained.sum == pytest.approx(0.9)
    assert gained.mean == pytest.approx(0.225)
    # Two of four are in (0.1, 0.2]: the median is that bucket's end, the first quarter its middle.
    assert gained.quantile(0.5) == pytest.approx(0.2)
    assert gained.quantile(0.25) == pytest.approx(0.15)
    assert gained.quantile(0.75) == pytest.approx(0.3)
    assert gained.summary() == {
        "count": 4,
        "mean_ms": 225.0,
        "p50_ms": 200.0,
        "p95_ms": 380.0,
        "p99_ms": 396.0,
    }


def test_labels_that_are_not_named_are_summed(registry: CollectorRegistry) -> None:
    histogram = Histogram("t_seconds", "", ("stage",), buckets=(0.1, 0.2), registry=registry)
    histogram.labels("a").observe(0.05)
    histogram.labels("b").observe(0.15)
    reading = read(registry)
    assert reading.buckets("t_seconds") == {0.1: 1, 0.2: 2, math.inf: 2}
    assert reading.values("t_seconds_count", "stage") == ["a", "b"]
    assert reading.total("t_seconds_count") == 2
    assert reading.total("t_seconds_count", stage="b") == 1
    assert reading.total("nothing") == 0


def test_beyond_the_last_bucket_the_quantile_is_its_bound(registry: CollectorRegistry) -> None:
    histogram = Histogram("t_seconds", "", buckets=(0.1, 0.2), registry=registry)
    before = read(registry)
    histogram.observe(5.0)
    assert Gained.between(before, read(registry), "t_seconds").quantile(0.99) == 0.2


def test_nothing_gained_has_no_quantiles(registry: CollectorRegistry) -> None:
    histogram = Histogram("t_seconds", "", buckets=(0.1, 0.2), registry=registry)
    histogram.observe(0.1)
    reading = read(registry)
    gained = Gained.between(reading, reading, "t_seconds")
    assert gained.quantile(0.5) is None
    assert gained.mean is None
