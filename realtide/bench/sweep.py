"""Figures of one point of the sweep, and how curves compare: numbers in, numbers out (ours).

All word errors of all pools count alike; latencies are of all frames of all pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jiwer
import numpy as np
import numpy.typing as npt

from realtide.bench.pools import Pool, Utterance
from realtide.engines.ancat import latency

if TYPE_CHECKING:
    from realtide.bench.recognize import Recognized

_RESAMPLES, _SEED = 2000, 2305
LOADED = 0.8  # of one processor: the second user-perceived latency


@dataclass(frozen=True, slots=True)
class Clock:
    """What turns frames into seconds: a frame's length, the front end's overhang, the cost of a node."""

    frame: float
    overhang: float
    node: float

    def heard(self, frames: Any) -> Any:
        """Seconds of audio that must be there before input frame(s) `frames` exist."""
        return (frames + 1) * self.frame + self.overhang


@dataclass(slots=True)
class Tally:
    """Collects one point over all pools."""

    clock: Clock
    layers: int
    errors: list[int] = field(default_factory=list)  # by utterance
    words: list[int] = field(default_factory=list)
    pools: dict[str, tuple[int, int]] = field(default_factory=dict)
    waits: list[npt.NDArray[np.float64]] = field(default_factory=list)  # algorithmic latency, frames
    perceived: dict[str, list[npt.NDArray[np.float64]]] = field(
        default_factory=lambda: {"measured": [], "loaded": []}
    )
    emitted: list[float] = field(default_factory=list)  # seconds after the end of the word

    def add(self, pool: Pool, found: Sequence[Recognized]) -> None:
        """Count what was recognized of `pool`."""
        pairs = [(pool.utterances[one.index], one) for one in found]
        aligned = align([(reference.text, one.text) for reference, one in pairs])
        wrong = words = 0
        for (reference, one), (errors, correct) in zip(pairs, aligned, strict=True):
            self.errors.append(errors)
            self.words.append(len(reference.text.split()))
            wrong, words = wrong + errors, words + self.words[-1]
            self._timing(reference, one, correct)
        self.pools[pool.name] = (wrong, words)

    def _timing(self, reference: Utterance, one: Recognized, correct: Iterable[tuple[int, int]]) -> None:
        self.waits.append((one.available - np.arange(len(one.available))).astype(np.float64))
        depths = one.depths.astype(np.int64)
        costs = {"measured": self.clock.node, "loaded": LOADED * self.clock.frame / self.layers}
        for name, cost in costs.items():
            self.perceived[name].append(latency.simulate(depths, cost, self.clock.frame).upl)
        if reference.words:
            for at, said in correct:
                row = one.words[said][1]
                heard = float(self.clock.heard(one.available[row]))
                self.emitted.append(heard - reference.words[at][2])

    def figures(self) -> dict[str, Any]:
        """Everything of the point. Times in milliseconds; latencies without the front end's overhang."""
        total, words = sum(self.errors), sum(self.words)
        low, high = interval(self.errors, self.words)
        return {
            "wer_percent": round(100 * total / max(words, 1), 3),
            "wer_interval_percent": [round(100 * low, 3), round(100 * high, 3)],
            "errors": total,
            "words": words,
            "pools": {
                name: round(100 * wrong / max(count, 1), 3) for name, (wrong, count) in self.pools.items()
            },
            "algorithmic_latency": _report(np.concatenate(self.waits) * self.clock.frame),
            "user_perceived_latency": _report(np.concatenate(self.perceived["measured"])),
            "user_perceived_latency_loaded": _report(np.concatenate(self.perceived["loaded"])),
            "emission_delay": _report(np.asarray(self.emitted)) if self.emitted else None,
        }


def align(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Word errors of each (reference, hypothesis), and the indices of words that are right in both."""
    found: list[tuple[int, list[tuple[int, int]]]] = [(len(said.split()), []) for _, said in pairs]
    spoken = [at for at, (reference, _) in enumerate(pairs) if reference]
    if not spoken:
        return found
    output = jiwer.process_words([pairs[at][0] for at in spoken], [pairs[at][1] for at in spoken])
    for at, chunks in zip(spoken, output.alignments, strict=True):
        errors, right = 0, []
        for chunk in chunks:
            reference = range(chunk.ref_start_idx, chunk.ref_end_idx)
            said = range(chunk.hyp_start_idx, chunk.hyp_end_idx)
            if chunk.type == "equal":
                right += list(zip(reference, said, strict=True))
            else:
                errors += max(len(reference), len(said))
        found[at] = errors, right
    return found


def interval(errors: Sequence[int], words: Sequence[int]) -> tuple[float, float]:
    """95 percent interval of the pooled word error rate, utterances redrawn (Bisani and Ney, ICASSP 2004)."""
    wrong, counts = np.asarray(errors), np.asarray(words)
    drawn = np.random.default_rng(_SEED).integers(len(wrong), size=(_RESAMPLES, len(wrong)))
    rates = wrong[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1)
    low, high = np.percentile(rates, (2.5, 97.5))
    return float(low), float(high)


def _report(seconds: npt.NDArray[np.float64]) -> dict[str, Any]:
    report = latency.Report.of(seconds * 1000)
    figures = {name: round(getattr(report, name), 2) for name in ("mean_ms", "p50_ms", "p90_ms", "p99_ms")}
    return {"count": report.frames, **figures}


def compare(
    points: Sequence[Mapping[str, Any]], family: str, figure: str = "mean_ms"
) -> list[dict[str, Any]]:
    """Each point of `family` against every other family at the same algorithmic latency.

    The other curve is linear between its points; outside of its range there is no comparison. A family with a
    single point is compared only at that latency, which never meets: it is left out.
    """

    def at(point: Mapping[str, Any]) -> float:
        return float(point["algorithmic_latency"][figure])

    others: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if point["family"] != family:
            others.setdefault(point["family"], []).append(point)
    found = []
    for name, curve in others.items():
        curve = sorted(curve, key=at)
        if len(curve) < 2:
            continue
        grid, rates = [at(point) for point in curve], [float(point["wer_percent"]) for point in curve]
        for point in points:
            here = at(point)
            if point["family"] == family and grid[0] <= here <= grid[-1]:
                other = float(np.interp(here, grid, rates))
                found.append(
                    {
                        "latency": figure,
                        "at_ms": here,
                        family: point["wer_percent"],
                        name: round(other, 3),
                        "below": point["wer_percent"] < other,
                    }
                )
    return found


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points as a Markdown table."""
    head = (
        "model", "bias", "WER %", "95 %", "alg. mean ms", "alg. p90 ms", "UPL mean ms", "UPL p90 ms",
        f"UPL at {LOADED:.0%} load, mean ms", "emission mean ms",
    )  # fmt: skip
    rows = [head, tuple("---" if at == 0 else "---:" for at in range(len(head)))]
    for point in points:
        waits, perceived = point["algorithmic_latency"], point["user_perceived_latency"]
        low, high = point["wer_interval_percent"]
        emission = point["emission_delay"]
        rows.append(
            (
                point["label"],
                f"{point['bias']:.9g}" if point["rule"] == "adaptive" else "",
                f"{point['wer_percent']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{waits['mean_ms']:.0f}",
                f"{waits['p90_ms']:.0f}",
                f"{perceived['mean_ms']:.1f}",
                f"{perceived['p90_ms']:.1f}",
                f"{point['user_perceived_latency_loaded']['mean_ms']:.0f}",
                "" if emission is None else f"{emission['mean_ms']:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
