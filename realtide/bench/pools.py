"""Reads evaluation pools as a recipe's `prepare.py` writes them (format: the recipe's pool.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from realtide.cli.errors import CommandError

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Utterance:
    """Where an utterance's log-mel rows are, what was said, and (word, start, end) in seconds where known."""

    offset: int
    frames: int
    text: str
    words: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """`features` [N, mel] float16, memory-mapped, not normalised; utterances whose text is sure."""

    name: str
    features: npt.NDArray[np.float16]
    utterances: tuple[Utterance, ...]


def load_pool(folder: Path) -> Pool:
    """Open a pool. Raises CommandError if the folder holds none, or none that is sure of its text."""
    try:
        rows = [json.loads(line) for line in (folder / "index.jsonl").read_text("utf-8").splitlines()]
        features = np.load(folder / "features.npy", mmap_mode="r")
        found = tuple(
            Utterance(
                int(row["offset"]),
                int(row["frames"]),
                str(row["text"]),
                tuple((str(word), float(start), float(end)) for word, start, end in row["words"]),
            )
            for row in rows
            if row["sure"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{folder} is not a pool of utterances: {error!r}") from None
    if not found:
        raise CommandError(f"{folder} has no utterance whose text is sure")
    return Pool(folder.name, features, found)


@dataclass(frozen=True, slots=True)
class Batch:
    """Normalised log-mel rows [B, F, mel], zeros after each end; encoder frames [B]; which utterances."""

    features: Float32
    frames: npt.NDArray[np.int64]
    picked: tuple[int, ...]


def batches(pool: Pool, mean: Float32, std: Float32, stride: int, budget: int = 2400) -> Iterator[Batch]:
    """All utterances of at least a frame, similar lengths together, at most `budget` encoder frames each."""
    lengths = [utterance.frames // stride for utterance in pool.utterances]
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and lengths[order[end]] * (end + 1 - start) <= budget:
            end += 1
        yield _stack(pool, order[start:end], lengths, mean, std, stride)
        start = end


def _stack(
    pool: Pool, picked: Sequence[int], lengths: Sequence[int], mean: Float32, std: Float32, stride: int
) -> Batch:
    longest = max(lengths[i] for i in picked)
    features = np.zeros((len(picked), longest * stride, pool.features.shape[1]), np.float32)
    for row, i in enumerate(picked):
        utterance, rows = pool.utterances[i], lengths[i] * stride
        own = pool.features[utterance.offset : utterance.offset + rows]
        features[row, :rows] = (np.asarray(own, np.float32) - mean) / std
    return Batch(features, np.array([lengths[i] for i in picked], np.int64), tuple(picked))
