"""The bundle's word pieces: byte-pair encoding of training texts only (ours, on SentencePiece).

Byte-pair merges go by frequency: the bundle's own commands become whole words, rare prompt words share
pieces. (A unigram model of the same size spends its pieces the other way round: "roast" became three,
"representative" one.)

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
from data import Utterance, read_prompts
from phrases import CoffeeGrammar, digit_string

PIECES = 256
_ALPHABET = string.ascii_lowercase + "'"


def tokenizer_texts(utterances: Sequence[Utterance]) -> list[str]:
    """Texts to learn pieces from: training texts, and the phrases that are spoken only later.

    A distinct text counts at most 60 times: enough that the bundle's own commands become whole words, not so
    often that two thousand single digits outweigh the rest. 1,200 grammar orders and 400 digit strings stand
    for the phrases that are put together later.
    """
    heard = [*utterances, *read_prompts()[0]]
    counts = Counter(u.text for u in heard if u.split == "train")
    texts = [text for text, count in sorted(counts.items()) for _ in range(min(count, 60))]
    rng = np.random.default_rng(3)
    grammar = CoffeeGrammar(utterances)
    texts += [grammar.draw(rng) for _ in range(1200)]
    return texts + [digit_string(rng) for _ in range(400)]


def train_tokenizer(utterances: Sequence[Utterance], path: Path) -> None:
    """Train and write the model to `path`; every letter is a piece, so that no English word is unknown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_texts(utterances)),
        model_writer=model,
        model_type="bpe",
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
