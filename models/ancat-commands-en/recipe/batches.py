"""Batches for training and evaluation out of a pool: varied log-mel windows, by length (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pool import Pool, Record
from spectral import STRENGTHS, Strength, Words, mask, speech_span, vary

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

    def mel(self, index: int) -> npt.NDArray[np.float32]:
        """Log-mel [F, 80] of an example, not normalised."""
        return np.asarray(self.pool.mel(self.examples[index][0]), np.float32)

    def spoken(self) -> list[int]:
        """Encoder frames of every example's speech with the silence that `trim` leaves on average."""
        spans = (speech_span(self.mel(index)) for index in range(len(self.examples)))
        return [
            min(count, (last - first + 90) // 4)
            for (first, last), (_, _, count) in zip(spans, self.examples, strict=True)
        ]


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
    picked: Sequence[tuple[Corpus, int]],
    config: EncoderConfig,
    rng: np.random.Generator | None,
    *,
    flat: bool = False,
    strength: Strength = STRENGTHS["mild"],
) -> Batch:
    """Stack examples; with a generator they are varied by `strength` as spectral.py has it.

    `flat`: guess word times that are not known. Babble is made of the batch's other utterances.
    """
    mels, targets, frames, times = [], [], [], []
    short = rng is not None and rng.random() < strength.p_trim
    for data, index in picked:
        record, ids, count = data.examples[index]
        mel = data.mel(index)
        words: Words = record.words
        if flat and not words:
            words = flat_words(record, mel)
        if rng is not None:
            others = [
                other.mel(at)
                for other, at in (picked[int(n)] for n in rng.integers(len(picked), size=rng.integers(1, 4)))
            ]
            mel, words = vary(mel, words, rng, others, strength, short=short)
            count = max(len(mel) // config.stride, len(ids) + 1)
        mel = (mel - data.mean) / data.std
        mels.append(mel if rng is None else mask(mel, rng, strength))
        targets.append(ids)
        frames.append(count)
        times.append(words)
    longest = rounded(max(frames))
    tokens = -(-max(1, max(len(ids) for ids in targets)) // 4) * 4
    features = np.zeros((len(mels), longest * config.stride, config.mel_bins), np.float32)
    padded = np.zeros((len(mels), tokens), np.int64)
    labels = np.full((len(mels), longest), -100, np.int64)
    for row, words in enumerate(times):
        labels[row, : frames[row]] = labels_of(words, picked[row][0].units, frames[row])
    for row, (mel, ids) in enumerate(zip(mels, targets, strict=True)):
        cut = min(len(mel), features.shape[1])
        features[row, :cut] = mel[:cut]
        padded[row, : len(ids)] = ids
    spoken = [
        [unit for word in data.examples[index][0].text.split() for unit in data.units(word)]
        for data, index in picked
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


def mixture(
    corpora: Sequence[Corpus], budget: int, rng: np.random.Generator
) -> Iterator[list[tuple[Corpus, int]]]:
    """Endless batches of utterances of similar length out of all corpora, about `budget` encoder frames each.

    One utterance leads a batch: its corpus is drawn at random (one that is listed twice, twice as often), its
    turn comes as often as that of any other of its corpus. The rest are drawn likewise among those that are
    0.7 to 1 times as long, speech with a little silence around it. So a step's gradient speaks for all sets:
    batches of one set each pulled the joiner to and fro.
    """
    lengths = [np.array(data.spoken()) for data in corpora]
    orders = [np.argsort(length, kind="stable") for length in lengths]
    ranked = [length[order] for length, order in zip(lengths, orders, strict=True)]
    turns: list[list[int]] = [[] for _ in corpora]
    while True:
        lead = int(rng.integers(len(corpora)))
        if not turns[lead]:
            turns[lead] = rng.permutation(len(lengths[lead])).tolist()
        index = turns[lead].pop()
        longest = lengths[lead][index]
        batch = [(corpora[lead], index)]
        while (len(batch) + 1) * rounded(longest) <= budget:
            other = int(rng.integers(len(corpora)))
            low, high = np.searchsorted(ranked[other], [0.7 * longest, longest + 1])
            if low < high:
                batch.append((corpora[other], int(orders[other][rng.integers(low, high)])))
        yield batch
