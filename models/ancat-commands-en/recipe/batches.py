"""Batches for training and evaluation out of a pool: SpecAugmented log-mel windows, by length (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pool import Pool, Record

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.offline import windows_of
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.training import Batch

BUCKET = 20  # encoder frames


def rounded(frames: int) -> int:
    """Frames that a batch with an utterance of this length is padded to."""
    return -(-frames // BUCKET) * BUCKET


@dataclass(slots=True)
class Corpus:
    """A pool with its targets. `examples` are (record, token ids, encoder frames) of the usable records."""

    pool: Pool
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    examples: list[tuple[Record, list[int], int]]
    units: Callable[[str], list[int]]


def corpus(
    pool: Pool,
    tokenizer: Tokenizer,
    cmvn: npt.NDArray[np.float32],
    stride: int,
    units: Callable[[str], list[int]] | None = None,
) -> Corpus:
    """Tokenize. `units` gives the CTC head's classes of a word; by default its tokens.

    Records whose text has no fewer tokens than frames are of no use to the losses and are left out.
    """
    examples = []
    for record in pool.records:
        ids = tokenizer.encode(record.text) if record.text else []
        frames = record.frames // stride
        if len(ids) < frames:
            examples.append((record, ids, frames))
    return Corpus(pool, cmvn[0], cmvn[1], examples, units or tokenizer.encode)


def spec_augment(mel: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """SpecAugment on normalised features [F, 80], and a random gain.

    Two frequency masks of up to 8 bins; time masks of up to 6 frames (10 ms), one a second, 8 at most. Longer
    masks, as are usual for read sentences, hide whole digits.
    """
    out = mel.copy()
    out += rng.normal(0.0, 0.25)
    for _ in range(2):
        width = int(rng.integers(0, 9))
        start = int(rng.integers(0, mel.shape[1] - width))
        out[:, start : start + width] = 0.0
    for _ in range(max(1, min(8, len(mel) // 100))):
        width = int(rng.integers(0, min(7, max(1, len(mel) // 6) + 1)))
        start = int(rng.integers(0, len(mel) - width + 1))
        out[start : start + width] = 0.0
    return out


def flat_words(record: Record, mel: npt.NDArray[np.float32]) -> list[tuple[str, float, float]]:
    """A first guess at word times [s] of clean speech `mel` [F, 80].

    The words share the span of loud frames by their letters.
    """
    loudness = mel.mean(1)
    low, high = np.percentile(loudness, [10, 95])
    loud = np.flatnonzero(loudness > low + 0.4 * (high - low))
    words = record.text.split()
    if not words or high - low < 1e-3:
        return []
    first, last = 0.01 * loud[0], 0.01 * (loud[-1] + 1)
    edges = np.cumsum([0, *(len(word) for word in words)])
    times = first + (last - first) * edges / edges[-1]
    return [(word, float(times[k]), float(times[k + 1])) for k, word in enumerate(words)]


def labels_of(
    words: Sequence[tuple[str, float, float]], units: Callable[[str], list[int]], frames: int
) -> npt.NDArray[np.int64]:
    """Unit of each encoder frame [frames] from word times [s]; -100 if there are none.

    A word's units share its time.
    """
    labels = np.full(frames, 0 if words else -100, np.int64)
    for word, start, end in words:
        ids = np.array(units(word) or [0])
        first = int(start / 0.04)
        count = max(len(ids), int(np.ceil(end / 0.04)) - first)
        share = ids[np.arange(count) * len(ids) // count]
        labels[first : first + count] = share[: max(0, frames - first)]
    return labels


def make_batch(
    data: Corpus,
    picked: Sequence[int],
    config: EncoderConfig,
    rng: np.random.Generator | None,
    *,
    flat: bool = False,
) -> Batch:
    """Stack examples; with a generator they are SpecAugmented.

    `flat`: guess word times that are not known.
    """
    mels, targets, frames = [], [], []
    for index in picked:
        record, ids, count = data.examples[index]
        mel = (np.asarray(data.pool.mel(record), np.float32) - data.mean) / data.std
        mels.append(mel if rng is None else spec_augment(mel, rng))
        targets.append(ids)
        frames.append(count)
    longest = rounded(max(frames))
    tokens = -(-max(1, max(len(ids) for ids in targets)) // 4) * 4
    features = np.zeros((len(mels), longest * config.stride, config.mel_bins), np.float32)
    padded = np.zeros((len(mels), tokens), np.int64)
    labels = np.full((len(mels), longest), -100, np.int64)
    for row, index in enumerate(picked):
        record = data.examples[index][0]
        words = list(record.words)
        if flat and not words:
            words = flat_words(record, np.asarray(data.pool.mel(record), np.float32))
        labels[row, : frames[row]] = labels_of(words, data.units, frames[row])
    for row, (mel, ids) in enumerate(zip(mels, targets, strict=True)):
        cut = min(len(mel), features.shape[1])
        features[row, :cut] = mel[:cut]
        padded[row, : len(ids)] = ids
    spoken = [
        [unit for word in data.examples[index][0].text.split() for unit in data.units(word)]
        for index in picked
    ]
    units = np.zeros((len(mels), max(1, max(map(len, spoken)))), np.int64)
    for row, ids in enumerate(spoken):
        units[row, : len(ids)] = ids
    return Batch(
        windows_of(torch.from_numpy(features), config),
        torch.tensor(frames),
        torch.from_numpy(padded),
        torch.tensor([len(ids) for ids in targets]),
        torch.from_numpy(units),
        torch.tensor([len(ids) for ids in spoken]),
        torch.from_numpy(labels),
    )


def epochs(data: Corpus, budget: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless index lists of similar length, each about `budget` encoder frames with padding.

    Batches come in few shapes, since matrix kernels are compiled anew for each: lengths are rounded up to
    `BUCKET` frames and every batch of a bucket has the same number of utterances (the last one is filled
    up from its bucket at random).
    """
    buckets: dict[int, list[int]] = {}
    for index, (_, _, frames) in enumerate(data.examples):
        buckets.setdefault(rounded(frames), []).append(index)
    while True:
        lists: list[list[int]] = []
        for length, members in sorted(buckets.items()):
            size = max(1, budget // length)
            order = [members[int(at)] for at in rng.permutation(len(members))]
            missing = -len(order) % size
            order += [members[int(at)] for at in rng.integers(0, len(members), missing)]
            lists += [order[start : start + size] for start in range(0, len(order), size)]
        for at in rng.permutation(len(lists)):
            yield lists[int(at)]
