"""The tokenizer: ids, words and the characters it refuses."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.ancat.tokenizer import BLANK, Tokenizer

LINES = [
    "one two three four five six seven eight nine zero",
    "two large cappuccinos and one small espresso please",
    "hey realtide what time is it",
    "please hold the line while we connect your call",
    "seven seven one nine oh four",
]


def train(upper: bool = False, byte_fallback: bool = False) -> bytes:
    out = io.BytesIO()
    lines = [line.upper() if upper else line for line in LINES]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines * 4),
        model_writer=out,
        vocab_size=340 if byte_fallback else 60,
        model_type="unigram",
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=3,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model)


def test_round_trip_and_ids_leave_room_for_blank(tokenizer: Tokenizer, model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocabulary == pieces.GetPieceSize() + 1
    for line in LINES:
        ids = tokenizer.encode(line)
        assert BLANK not in ids
        assert [i - 1 for i in ids] == pieces.EncodeAsIds(line)
        assert tokenizer.decode(ids) == line


def test_words_cover_the_tokens_in_order(tokenizer: Tokenizer) -> None:
    for line in LINES:
        ids = tokenizer.encode(line)
        words = tokenizer.words(ids)
        assert [w for w, _, _ in words] == line.split()
        assert words[0][1] == 0
        assert words[-1][2] == len(ids) - 1
        for (_, _, last), (_, first, _) in itertools.pairwise(words):
            assert first == last + 1
            assert tokenizer.starts_word(ids[first])


def test_a_word_mark_alone_starts_a_word(tokenizer: Tokenizer) -> None:
    ids = range(1, tokenizer.vocabulary)
    mark = next(i for i in ids if tokenizer.starts_word(i) and not tokenizer.surface([i]))
    a, b = [i for i in ids if not tokenizer.starts_word(i) and tokenizer.surface([i])][:2]
    text = tokenizer.surface([a, b])
    assert tokenizer.words([a, mark, a, b, mark]) == [(tokenizer.surface([a]), 0, 0), (text, 1, 3)]
    assert tokenizer.decode([mark, mark]) == ""
    assert tokenizer.words([]) == []


@given(data=st.data())
def test_decoding_agrees_with_sentencepiece(tokenizer: Tokenizer, model: bytes, data: st.DataObject) -> None:
    """Any ids but the unknown piece's, which SentencePiece writes as a symbol and we drop."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = data.draw(st.lists(st.integers(2, tokenizer.vocabulary - 1), max_size=12))
    expected = " ".join(pieces.DecodeIds([i - 1 for i in ids]).split())
    assert tokenizer.decode(ids) == expected


def test_case_follows_the_model() -> None:
    upper = Tokenizer(train(upper=True))
    assert upper.decode(upper.encode("hey Realtide")) == "HEY REALTIDE"


def test_lower_case_model_takes_capitals(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("HEY Realtide")) == "hey realtide"


def test_unwritable_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="does not write"):
        tokenizer.encode("crème brûlée")
    for text in ("", "  "):
        with pytest.raises(ValueError, match="no text"):
            tokenizer.encode(text)


def test_byte_pieces_join_to_characters() -> None:
    tokenizer = Tokenizer(train(byte_fallback=True))
    ids = tokenizer.encode("naïve call")
    assert tokenizer.decode(ids) == "naïve call"
    assert [w for w, _, _ in tokenizer.words(ids)] == ["naïve", "call"]


def test_loads_from_a_file_and_refuses_garbage(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    assert Tokenizer(path).vocabulary == Tokenizer(model).vocabulary
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(path)
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "absent.model")
