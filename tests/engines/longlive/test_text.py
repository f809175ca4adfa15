"""The text encoder and the prompts' tokenizer."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import sentencepiece
import torch

from realtide.engines.longlive.config import TextConfig
from realtide.engines.longlive.text import EncodeText, TextEncoder, distance_buckets
from realtide.engines.longlive.tokenizer import PromptTokenizer, clean

LINES = ["a cat walks over a red roof", "the sun sets behind the sea & the sky", "a dog runs"]


def test_buckets_are_those_of_the_reference_formula() -> None:
    """As T5's code has it, in PyTorch's float32; the edges at 16, 32, 64 hang on the last digit."""
    for buckets, most in ((16, 128), (8, 64)):
        exact = buckets // 2
        distance = torch.arange(most + 1)
        far = exact + (
            torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact) * (buckets - exact)
        ).long().clamp(max=buckets - 1 - exact)
        want = torch.where(distance < exact, distance, far)
        np.testing.assert_array_equal(distance_buckets(buckets, most), want.numpy())


def test_padding_changes_nothing_and_gives_zeros() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(vocab=40, dim=12, attention_dim=8, ff_dim=20, heads=2, layers=2))
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ids = torch.randint(0, 40, (2, 9))
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    with torch.inference_mode():
        both = encoder.eval()(ids, mask)
        assert not both[0, 4:].any()
        for row, count in enumerate((4, 9)):
            torch.testing.assert_close(both[row, :count], EncodeText(encoder)(ids[row, :count]))
        far = EncodeText(encoder)(torch.cat([ids[1]] * 40))  # beyond the largest distance
    assert torch.isfinite(far).all()


def train(eos_id: int = 1) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 4), model_writer=out, vocab_size=45, hard_vocab_limit=False,
        minloglevel=3, pad_id=0, eos_id=eos_id, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return out.getvalue()


def test_prompts_end_with_the_end_token() -> None:
    model = train()
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    tokenizer = PromptTokenizer(model, limit=30)
    assert tokenizer.encode(" a  cat\n walks ") == [*pieces.EncodeAsIds("a cat walks"), 1]
    assert tokenizer.encode("") == [1]
    assert tokenizer.vocabulary == pieces.GetPieceSize()


def test_prompts_that_are_too_long_are_refused() -> None:
    model = train()
    count = len(PromptTokenizer(model, limit=1000).encode(LINES[0]))
    assert len(PromptTokenizer(model, limit=count).encode(LINES[0])) == count
    with pytest.raises(ValueError, match=f"prompt has {count} tokens, the model takes at most {count - 1}"):
        PromptTokenizer(model, limit=count - 1).encode(LINES[0])


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        PromptTokenizer(b"text", limit=5)
    with pytest.raises(ValueError, match="no end token"):
        PromptTokenizer(train(eos_id=-1), limit=5)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\t cat\n", "a cat"),
        ("sun &amp;amp; sea", "sun & sea"),
        ("&lt;b&gt;", "<b>"),
        ("\u201cit\u2019s\u201d", '"it\'s"'),
        ("\ufb01sh", "fish"),
        ("\uff23\uff21\uff34\uff01\u3000x", "CAT! x"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_prompts_are_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
