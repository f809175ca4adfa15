"""The text encoders against transformers', and the tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file

from realtide.engines.easycontrol.config import PooledConfig, TextConfig
from realtide.engines.easycontrol.text import ClipText, PoolText, T5Encoder
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.runtime.golden import difference
from realtide.engines.runtime.torch_program import load
from tests.engines.easycontrol.conftest import GOLDEN
from tests.engines.easycontrol.small import POOLED, TOKENIZER

T5 = TextConfig(vocab=60, dim=24, head_dim=8, heads=3, ff_dim=40, layers=2, buckets=8, max_distance=16)
CLIP = PooledConfig(vocab=60, dim=24, heads=3, ff_dim=40, layers=2, tokens=12, start=58, end=59)


def test_t5_computes_what_transformers_does() -> None:
    case = load_file(GOLDEN / "t5_seed52.safetensors")
    encoder = load(T5Encoder(T5), load_file(GOLDEN / "t5_weights_seed52.safetensors"))
    with torch.inference_mode():
        embeds = encoder(torch.from_numpy(case["ids"])).numpy()
    assert difference(embeds, case["embeds"]).rel_l2 < 1e-5


def test_clip_computes_what_transformers_does() -> None:
    case = load_file(GOLDEN / "clip_seed52.safetensors")
    encoder = load(ClipText(CLIP), load_file(GOLDEN / "clip_weights_seed52.safetensors"))
    with torch.inference_mode():
        pooled = PoolText(encoder)(torch.from_numpy(case["ids"][0])).numpy()
    assert difference(pooled[None], case["pooled"]).rel_l2 < 1e-5


def test_the_pooled_prompt_is_read_at_the_first_end() -> None:
    torch.manual_seed(1)
    encoder = ClipText(CLIP).eval()
    ids = torch.tensor([[58, 4, 5, 59, 59, 59, 59, 59, 59, 59, 59, 59]])
    other = ids.clone()
    other[0, 5:] = 7  # what comes after it is not seen
    with torch.inference_mode():
        torch.testing.assert_close(encoder(ids), encoder(other))
        assert (encoder(ids) - encoder(ids.roll(1, 1))).abs().max() > 1e-3


def test_prompts_are_padded() -> None:
    pieces = PromptTokenizer(TOKENIZER, 12)
    ids = pieces.encode("a frog moves up")
    assert ids.shape == (12,)
    count = pieces.count("a frog moves up")
    assert list(ids[:count]) == pieces.pieces("a frog moves up")
    assert ids[count - 1] == 1
    assert not ids[count:].any()
    with pytest.raises(ValueError, match="prompt has 15 tokens, the model takes at most 12"):
        pieces.encode("frog " * 14)


def test_the_pooled_encoder_gets_the_same_pieces_where_there_are_no_pairs() -> None:
    pieces = PromptTokenizer(TOKENIZER, 30)
    ids = PooledTokenizer(POOLED, pieces).encode("a frog moves up")
    own = pieces.pieces("a frog moves up")
    assert list(ids) == [*own, *[1] * (24 - len(own))]
    long = PooledTokenizer(POOLED, pieces).encode("frog " * 40)
    assert list(long) == [*pieces.pieces("frog " * 40)[:23], 1]


def test_byte_pairs_are_cut_and_padded(tmp_path: Path) -> None:
    words = {"<|startoftext|>": 58, "<|endoftext|>": 59, "frog": 3, "cat": 4, "[UNK]": 0}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    pieces = PromptTokenizer(TOKENIZER, 30)
    tokenizer = PooledTokenizer(CLIP, pieces, tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(tokenizer.encode("frog cat"), [58, 3, 4, *[59] * 9])
    np.testing.assert_array_equal(tokenizer.encode("frog " * 40), [58, *[3] * 10, 59])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        PooledTokenizer(CLIP, pieces, tmp_path / "tokenizer.json")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        PromptTokenizer(b"nothing", 5)
