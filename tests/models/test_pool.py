from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Recipe = Callable[[str], Any]


def record(recipe: Recipe, name: str, **more: Any) -> Any:
    return recipe("pool").Record(name, 0, 0, "one two", "strings", "train", "x", "real", 1.5, **more)


def test_a_pool_gives_back_what_was_written(recipe: Recipe, tmp_path: Path) -> None:
    pool = recipe("pool")
    rng = np.random.default_rng(0)
    features = [rng.normal(3, 2, (frames, 80)).astype(np.float16) for frames in (8, 20, 4)]
    waves = [rng.uniform(-0.9, 0.9, samples).astype(np.float32) for samples in (1000, 30, 7)]
    words = (("one", 0.1, 0.5), ("two", 0.6, 1.2))
    with pool.PoolWriter(tmp_path, audio=True) as writer:
        for number in range(3):
            entry = record(recipe, str(number), words=words, slots={"size": "large"}, sure=False)
            writer.add(entry, features[number], waves[number])
    loaded = pool.load_pool(tmp_path)
    assert isinstance(loaded.features, np.memmap)
    assert [r.name for r in loaded.records] == ["0", "1", "2"]
    for number, entry in enumerate(loaded.records):
        np.testing.assert_array_equal(loaded.mel(entry), features[number])
        np.testing.assert_allclose(loaded.samples(entry), waves[number], atol=2e-5)
        assert entry.words == words
        assert entry.slots == {"size": "large"}
        assert not entry.sure
    every = np.concatenate(features).astype(np.float64)
    mean, std = np.load(tmp_path / "cmvn.npy")
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, every.std(axis=0), rtol=1e-5)
    assert pool.hours(loaded.records) == pytest.approx(4.5 / 3600)


def test_a_pool_without_audio_says_so(recipe: Recipe, tmp_path: Path) -> None:
    pool = recipe("pool")
    with pool.PoolWriter(tmp_path) as writer:
        writer.add(record(recipe, "a"), np.ones((4, 80), np.float16))
    loaded = pool.load_pool(tmp_path)
    with pytest.raises(ValueError, match="no audio"):
        loaded.samples(loaded.records[0])
    with (
        pool.PoolWriter(tmp_path / "b", audio=True) as writer,
        pytest.raises(ValueError, match="samples are needed"),
    ):
        writer.add(record(recipe, "a"), np.ones((4, 80), np.float16))
