"""Toy transducers: a small random network over encoder rows and contexts, with real dependence on both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2

from realtide.engines.ancat.tokenizer import Tokenizer

Float32 = npt.NDArray[np.float32]


class ToyJoiner:
    """A one-hidden-layer joiner.

    Computed in float64 and rounded, so that a row's result never depends on its batch.
    """

    def __init__(
        self, seed: int, vocabulary: int = 6, width: int = 5, blank: float = 1.5, scale: float = 2.0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.vocabulary, self.width = vocabulary, width
        self._in = rng.standard_normal((width, 12))
        self._old = rng.standard_normal((vocabulary, 12))
        self._new = rng.standard_normal((vocabulary, 12)) * 1.5
        self._out = rng.standard_normal((12, vocabulary)) * scale / 3
        self._bias = np.zeros(vocabulary)
        self._bias[0] = blank
        self.calls = 0
        self.rows = 0

    def __call__(self, enc: Float32, contexts: npt.NDArray[np.int64]) -> Float32:
        assert enc.dtype == np.float32
        assert contexts.dtype == np.int64
        assert contexts.shape == (len(enc), 2)
        assert len(enc) > 0
        self.calls += 1
        self.rows += len(enc)
        hidden = np.tanh(enc @ self._in + self._old[contexts[:, 0]] + self._new[contexts[:, 1]])
        logits = hidden @ self._out + self._bias
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rounded: Float32 = np.round(log_probs, 5).astype(np.float32)
        return rounded

    def one(self, row: Float32, context: tuple[int, int]) -> Float32:
        """Log-probabilities [V] of a single row."""
        log_probs: Float32 = self(row[None], np.array([context], np.int64))[0]
        return log_probs


def rows_of(seed: int, frames: int, width: int = 5) -> Float32:
    """Random encoder rows [frames, width] with bursts, so that there is speech and there is silence."""
    rng = np.random.default_rng(seed)
    loud = np.repeat(rng.integers(0, 2, frames // 6 + 1), 6)[:frames]
    rows: Float32 = (rng.standard_normal((frames, width)) * (0.2 + 1.8 * loud[:, None])).astype(np.float32)
    return rows


def split(total: int, sizes: Sequence[int]) -> Iterator[slice]:
    """Slices of `sizes` (repeated) that cover `total` rows; a size may be 0."""
    position, k = 0, 0
    while position < total:
        end = min(total, position + sizes[k % len(sizes)])
        yield slice(position, end)
        position, k = end, k + 1


@cache
def toy_tokenizer() -> Tokenizer:
    """Blank, "▁a", "▁b", "c", "d", "▁e" and an unknown piece that no toy emits; written down, not trained."""
    proto: Any = sentencepiece_model_pb2  # generated at import: its names are not visible to a type checker
    model = proto.ModelProto()
    for piece in ("\N{LOWER ONE EIGHTH BLOCK}a", "\N{LOWER ONE EIGHTH BLOCK}b", "c", "d"):
        model.pieces.add(piece=piece, score=-1.0)
    model.pieces.add(piece="\N{LOWER ONE EIGHTH BLOCK}e", score=-1.0)
    model.pieces.add(piece="<unk>", type=proto.ModelProto.SentencePiece.UNKNOWN)
    model.trainer_spec.unk_id = 5
    return Tokenizer(model.SerializeToString())
