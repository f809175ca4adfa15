"""The bundle's word pieces: a unigram model over training texts only (ours, on SentencePiece).

Token ids of the transducer are piece id + 1, blank is 0 (see realtide.engines.ancat.tokenizer).
"""

from __future__ import annotations

import io
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from render import Clip
from text import DIGITS

PIECES = 256
_ALPHABET = string.ascii_lowercase + "'"


def tokenizer_texts(clips: Sequence[Clip]) -> list[str]:
    """Texts to learn pieces from. Each distinct text counts at most four times, so that two thousand single digits do
    not outweigh the rest; two hundred random digit strings stand for the strings that are only put together later."""
    texts = [text for text, count in sorted(Counter(clip.text for clip in clips).items()) for _ in range(min(count, 4))]
    rng = np.random.default_rng(3)
    return texts + [
        " ".join(DIGITS[int(d)] for d in rng.integers(10, size=int(rng.integers(2, 11)))) for _ in range(200)
    ]


def train_tokenizer(clips: Sequence[Clip], path: Path) -> None:
    """Train and write the model to `path`. Every letter is a piece of its own, so that no English word is unknown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_texts(clips)),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        character_coverage=1.0,
        required_chars=_ALPHABET,
        normalization_rule_name="identity",
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
