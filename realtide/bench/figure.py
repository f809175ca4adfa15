"""The sweep as a picture (extra `train`: matplotlib; ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_PANELS = (
    ("algorithmic_latency", "mean_ms", "mean algorithmic latency, ms"),
    ("algorithmic_latency", "p90_ms", "90th percentile of algorithmic latency, ms"),
    ("user_perceived_latency_loaded", "mean_ms", "mean user-perceived latency at 80 % load, ms"),
)
_STYLES = (("#0072b2", "o", "-"), ("#d55e00", "s", "--"), ("#009e73", "^", "-."), ("#777777", "D", ":"))


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Word error rate against latency, a curve for each family, bars for the 95 percent intervals."""
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(5 * len(_PANELS), 4.2), sharey=True)
    families = list(dict.fromkeys(point["family"] for point in points))
    for axis, (group, name, label) in zip(axes, _PANELS, strict=True):
        for number, family in enumerate(families):
            color, marker, line = _STYLES[number % len(_STYLES)]
            curve = sorted((p for p in points if p["family"] == family), key=lambda p: p[group][name])
            rates = [p["wer_percent"] for p in curve]
            below = [max(p["wer_percent"] - p["wer_interval_percent"][0], 0) for p in curve]
            above = [max(p["wer_interval_percent"][1] - p["wer_percent"], 0) for p in curve]
            axis.errorbar(
                [p[group][name] for p in curve], rates, (below, above), label=family, color=color,
                marker=marker, linestyle=line, capsize=2, elinewidth=0.7,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("word error rate, %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
