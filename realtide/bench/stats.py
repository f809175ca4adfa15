"""Percentiles of samples, and of what Prometheus histograms gained between two readings (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
POINTS = (50, 95, 99)


def summary(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float | int | None]:
    """Count, mean, p50, p95, p99 and maximum in milliseconds; None where there are no samples.

    Percentiles interpolate linearly between order statistics.
    """
    values = np.asarray(seconds, np.float64)
    names = ["mean_ms", *(f"p{point}_ms" for point in POINTS), "max_ms"]
    if not values.size:
        return {"count": 0} | dict.fromkeys(names)
    figures = [values.mean(), *np.percentile(values, POINTS), values.max()]
    return {"count": int(values.size)} | {
        name: round(float(figure) * 1000, 3) for name, figure in zip(names, figures, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Reading:
    """All samples of one scrape, by metric name and labels."""

    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def parse(cls, text: str) -> Reading:
        """Read Prometheus' text format. Raises ValueError if it is not that."""
        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = float(sample.value)
        return cls(samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have `labels`; 0 if there are none."""
        wanted = set(labels.items())
        return sum(value for key, value in self.samples.get(name, {}).items() if wanted <= key)

    def values(self, name: str, label: str) -> list[str]:
        """Values of a label of a metric, sorted."""
        return sorted({value for key in self.samples.get(name, {}) for n, value in key if n == label})

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts by upper bound of a histogram, summed over all other labels."""
        wanted = set(labels.items())
        found: dict[float, float] = {}
        for key, value in self.samples.get(f"{name}_bucket", {}).items():
            if wanted <= key:
                bound = float(dict(key)["le"])
                found[bound] = found.get(bound, 0.0) + value
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class Gained:
    """What a histogram gained between two readings: count, sum, and cumulative counts by upper bound."""

    count: float
    sum: float
    buckets: Mapping[float, float]

    @classmethod
    def between(cls, before: Reading, after: Reading, name: str, **labels: str) -> Gained:
        """The difference of two readings of one process' histogram `name`."""
        old, new = before.buckets(name, **labels), after.buckets(name, **labels)
        counts = {bound: value - old.get(bound, 0.0) for bound, value in new.items()}
        totals = (
            after.total(f"{name}_{part}", **labels) - before.total(f"{name}_{part}", **labels)
            for part in ("count", "sum")
        )
        return cls(next(totals), next(totals), counts)

    @property
    def mean(self) -> float | None:
        """Mean of what was observed; None without samples."""
        return self.sum / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The quantile `share` (0..1), linear within its bucket as Prometheus' histogram_quantile does.

        None without samples. In the last bucket, which has no upper bound, the highest bound there is: the
        true value is larger.
        """
        if self.count <= 0:
            return None
        rank, below, low = share * self.count, 0.0, 0.0
        for bound, cumulative in self.buckets.items():
            if cumulative >= rank:
                if math.isinf(bound):
                    return low
                inside = cumulative - below
                return low + (bound - low) * ((rank - below) / inside if inside else 1.0)
            below, low = cumulative, bound
        return low

    def summary(self) -> dict[str, Any]:
        """Count, and mean and percentiles in milliseconds, of a histogram of seconds."""
        points = {f"p{p}_ms": self.quantile(p / 100) for p in POINTS}
        return {"count": int(self.count)} | {
            name: None if value is None else round(value * 1000, 3)
            for name, value in {"mean_ms": self.mean, **points}.items()
        }
