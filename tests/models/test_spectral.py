"""Augmentation of log-mel features against the same effects on waveforms, and what it must keep."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Recipe = Callable[[str], Any]
Mel = npt.NDArray[np.float32]


@pytest.fixture
def order(recipe: Recipe, clips: Path) -> Mel:
    wave = recipe("data").load_audio(clips / "coffee-mocha.flac")
    return np.asarray(recipe("render").features_of(wave), np.float32)


def tone(recipe: Recipe, frequency: float) -> Mel:
    wave = np.sin(2 * np.pi * frequency * np.arange(16000) / 16000).astype(np.float32)
    return np.asarray(recipe("render").features_of(wave), np.float32)


def test_a_filter_peaks_at_its_centre(recipe: Recipe) -> None:
    spectral = recipe("spectral")
    for band in (20, 45, 70):
        assert int(tone(recipe, spectral.centres()[band]).mean(0).argmax()) == pytest.approx(band, abs=1)


def test_another_tract_moves_formants_by_its_factor(recipe: Recipe) -> None:
    moved = recipe("spectral").change_tract(tone(recipe, 1000), 1.12)
    target = tone(recipe, 1120).mean(0).argmax()
    assert int(moved.mean(0).argmax()) == pytest.approx(int(target), abs=1)


def test_tempo_moves_length_and_word_times(recipe: Recipe, order: Mel) -> None:
    faster, words = recipe("spectral").change_tempo(order, [("mocha", 1.0, 1.5)], 1.25)
    assert len(faster) == int(len(order) / 1.25)
    assert words == [("mocha", 0.8, 1.2)]


def test_trimming_keeps_the_speech_and_its_times(recipe: Recipe, order: Mel) -> None:
    spectral = recipe("spectral")
    silence = np.zeros((300, 80), np.float32)
    padded = np.concatenate([silence, order, silence])
    first, last = spectral.speech_span(padded)
    assert first >= 300
    assert last <= 300 + len(order)
    cut, words = spectral.trim(padded, [("a", 0.01 * first, 0.01 * last)], np.random.default_rng(3))
    assert len(cut) < len(padded) - 300
    start, end = (round(100 * edge) for edge in words[0][1:])
    np.testing.assert_array_equal(cut[start:end], padded[first:last])


def test_noise_lies_at_the_asked_distance(recipe: Recipe, order: Mel) -> None:
    spectral = recipe("spectral")
    strength = replace(spectral.STRENGTHS["full"], snr_db=(3.0, 3.0))
    for seed, others in ((1, []), (2, [order[::-1], order])):
        louder = spectral.add_noise(order, np.random.default_rng(seed), strength, others)
        added = np.log(np.maximum(np.exp(louder.astype(np.float64)) - np.exp(order), 1e-3))
        gap = spectral.level(order) - spectral.level(added.astype(np.float32))
        assert 10 * gap / np.log(10) == pytest.approx(3, abs=1)
        assert (louder >= order - 1e-5).all()


def test_a_room_adds_a_tail_and_nothing_before(recipe: Recipe) -> None:
    click = np.zeros((60, 80), np.float32)
    click[20] = 20.0
    wet = recipe("spectral").reverberate(click, np.random.default_rng(4))
    np.testing.assert_allclose(wet[:20], click[:20], atol=0.2)
    assert (np.diff(wet[21:40].mean(1)) < 0).all()


def test_a_telephone_leaves_the_middle_alone(recipe: Recipe, order: Mel) -> None:
    spectral = recipe("spectral")
    heard = spectral.telephone(order, np.random.default_rng(5))
    centres = spectral.centres()
    middle = (centres > 300) & (centres < 3400)
    np.testing.assert_array_equal(heard[:, middle], order[:, middle])
    assert heard[:, centres > 4000].mean() < 0.2 * order[:, centres > 4000].mean()


def test_variants_are_fixed_by_the_seed_and_stay_in_the_front_ends_range(recipe: Recipe, order: Mel) -> None:
    spectral = recipe("spectral")
    words = [("mocha", 1.0, 1.5)]

    def made(seed: int) -> Mel:
        mel, moved = spectral.vary(
            order, words, np.random.default_rng(seed), [order], spectral.STRENGTHS["full"]
        )
        assert [word for word, _, _ in moved] == ["mocha"]
        out: Mel = mel
        return out

    for seed in range(20):
        mel = made(seed)
        assert np.isfinite(mel).all()
        assert mel.min() >= 0.0
        np.testing.assert_array_equal(mel, made(seed))
    assert len(made(1)) != len(made(2)) or not np.allclose(made(1), made(2))


def test_masks_are_small(recipe: Recipe) -> None:
    spectral = recipe("spectral")
    plain = np.ones((400, 80), np.float32)
    hidden = [
        1 - spectral.mask(plain, np.random.default_rng(s), spectral.STRENGTHS["full"]).mean()
        for s in range(50)
    ]
    assert 0 < max(hidden) < 0.5
    assert np.mean(hidden) < 0.25
