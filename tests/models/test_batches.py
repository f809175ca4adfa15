"""Batches: sets are mixed, lengths are alike, the budget holds, and what is varied stays consistent."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.tokenizer import Tokenizer

Recipe = Callable[[str], Any]
BUNDLE = Path(__file__).parents[2] / "models" / "ancat-commands-en"


def made(recipe: Recipe, folder: Path, name: str, text: str, seconds: list[float]) -> Any:
    """A corpus of one text at several lengths: loud noise with half a second of quiet on both sides."""
    pool = recipe("pool")
    rng = np.random.default_rng(len(text))
    with pool.PoolWriter(folder / name) as writer:
        for number, length in enumerate(seconds):
            loud = rng.normal(15, 1, (int(100 * length), 80))
            quiet = np.zeros((50, 80))
            record = pool.Record(f"{name}/{number}", 0, 0, text, name, "train", "x", "real", length)
            writer.add(record, np.concatenate([quiet, loud, quiet]).astype(np.float16))
    tokenizer = Tokenizer(BUNDLE / "tokenizer.model")
    cmvn = np.stack([np.full(80, 9.0), np.full(80, 5.0)]).astype(np.float32)
    return recipe("batches").corpus(pool.load_pool(folder / name), tokenizer, cmvn, 4)


@pytest.fixture
def corpora(recipe: Recipe, tmp_path: Path) -> list[Any]:
    return [
        made(recipe, tmp_path, "coffee", "give me a mocha", [3.0, 3.2, 4.0, 6.0]),
        made(recipe, tmp_path, "strings", "one two three", [2.8, 3.1, 3.9]),
        made(recipe, tmp_path, "wakeword", "jarvis", [0.6, 0.7]),
    ]


def test_a_batch_mixes_sets_of_like_length_within_the_budget(recipe: Recipe, corpora: list[Any]) -> None:
    batches = recipe("batches")
    leads: Counter[str] = Counter()
    for batch in islice(batches.mixture(corpora, 500, np.random.default_rng(1)), 300):
        lengths = [data.spoken()[index] for data, index in batch]
        assert len(batch) * batches.rounded(lengths[0]) <= 500
        assert min(lengths) >= 0.7 * max(lengths)
        assert max(lengths) == lengths[0]
        sets = {data.examples[0][0].set for data, _ in batch}
        if batch[0][0] is corpora[2]:
            assert sets == {"wakeword"}  # nothing else is as short
        leads[batch[0][0].examples[0][0].set] += 1
        leads["mixed"] += len(sets) > 1
    assert all(leads[name] > 60 for name in ("coffee", "strings", "wakeword"))
    assert leads["mixed"] > 60


def test_every_utterance_of_a_corpus_leads_in_turn(recipe: Recipe, corpora: list[Any]) -> None:
    stream = recipe("batches").mixture(corpora[:1], 200, np.random.default_rng(2))
    leads = [batch[0][1] for batch in islice(stream, 8)]
    assert sorted(leads[:4]) == sorted(leads[4:]) == [0, 1, 2, 3]


def test_variation_changes_frames_and_neither_texts_nor_targets(recipe: Recipe, corpora: list[Any]) -> None:
    batches, config = recipe("batches"), EncoderConfig()
    picked = [(corpora[0], 0), (corpora[1], 1)]
    plain = batches.make_batch(picked, config, None)
    varied = batches.make_batch(picked, config, np.random.default_rng(3))
    again = batches.make_batch(picked, config, np.random.default_rng(3))
    for name in ("targets", "lengths", "units", "unit_lengths"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(varied, name))
    np.testing.assert_array_equal(varied.windows, again.windows)
    assert varied.windows.isfinite().all()
    assert plain.frames.tolist() == [100, 102]
    assert varied.frames.tolist() != plain.frames.tolist()
    assert (varied.frames > varied.lengths).all()
