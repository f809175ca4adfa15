from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Recipe = Callable[[str], Any]
Wave = npt.NDArray[np.float32]


@pytest.fixture
def order(recipe: Recipe, clips: Path) -> Wave:
    wave: Wave = recipe("data").load_audio(clips / "coffee-mocha.flac")
    return wave


def tone(frequency: float, seconds: float = 1.0) -> Wave:
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * 16000)) / 16000).astype(np.float32)


def loudest_frequency(wave: Wave) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * 16000 / len(wave))


def test_speed_moves_length_and_pitch(recipe: Recipe) -> None:
    faster = recipe("augment").warp_speed(tone(400), 1.15)
    assert len(faster) == pytest.approx(16000 / 1.15, abs=2)
    assert loudest_frequency(faster) == pytest.approx(460, abs=3)


def test_tempo_moves_length_but_not_pitch(recipe: Recipe) -> None:
    for factor in (0.8, 1.25):
        stretched = recipe("augment").stretch_tempo(tone(400), factor)
        assert len(stretched) == pytest.approx(16000 / factor, abs=500)
        assert loudest_frequency(stretched) == pytest.approx(400, abs=3)


def test_noise_has_unit_power_and_the_slope_of_its_colour(recipe: Recipe) -> None:
    augment = recipe("augment")
    for colour, slope_db in (("white", 0.0), ("pink", -3.0), ("brown", -6.0)):
        noise = augment.colour_noise(colour, 160000, np.random.default_rng(1))
        assert np.mean(noise**2) == pytest.approx(1, rel=0.3)
        power = np.abs(np.fft.rfft(noise)) ** 2
        hertz = np.fft.rfftfreq(len(noise), 1 / 16000)
        octaves = [power[(hertz >= f) & (hertz < 2 * f)].mean() for f in (200, 400, 800, 1600, 3200)]
        measured = np.polyfit(np.arange(5), 10 * np.log10(octaves), 1)[0]
        assert measured == pytest.approx(slope_db, abs=0.5)
    with pytest.raises(ValueError, match="colour must be one of"):
        augment.colour_noise("green", 100, np.random.default_rng(1))


def test_noise_is_added_at_the_asked_ratio(recipe: Recipe, order: Wave) -> None:
    augment = recipe("augment")
    noise = augment.colour_noise("white", len(order), np.random.default_rng(2))
    added = augment.add_noise(order, noise, 10.0) - order
    ratio = 20 * np.log10(augment.speech_level(order) / np.sqrt(np.mean(added**2)))
    assert ratio == pytest.approx(10, abs=0.3)


def test_babble_is_of_other_voices_at_unit_power(recipe: Recipe, order: Wave) -> None:
    mixed = recipe("augment").babble([order, order[::-1].copy()], 20000, np.random.default_rng(3))
    assert mixed.shape == (20000,)
    assert np.mean(mixed**2) == pytest.approx(1, rel=1e-3)


def test_a_room_decays_as_asked_and_keeps_the_direct_sound_first(recipe: Recipe) -> None:
    augment = recipe("augment")
    response = augment.room_response(np.random.default_rng(4), rt60=0.4)
    assert len(response) == 6400
    assert response[0] == 1.0
    assert np.abs(response[1:]).max() < 1.0
    # 60 dB over 0.4 s: from the second to the last eighth of it, 6/8 of 60 dB.
    early, late = (np.mean(response[k * 800 : (k + 1) * 800] ** 2) for k in (1, 7))
    assert 10 * np.log10(early / late) == pytest.approx(45, abs=6)


def test_a_room_does_not_delay_words(recipe: Recipe) -> None:
    augment = recipe("augment")
    click = np.zeros(8000, np.float32)
    click[3000] = 1
    wet = augment.reverberate(click, augment.room_response(np.random.default_rng(5)))
    assert wet.shape == click.shape
    assert int(np.argmax(np.abs(wet))) == 3000


def test_a_telephone_line_passes_its_band_only(recipe: Recipe, order: Wave) -> None:
    augment = recipe("augment")
    heard = augment.telephone(order)
    power = np.abs(np.fft.rfft(heard)) ** 2
    hertz = np.fft.rfftfreq(len(heard), 1 / 16000)
    inside = power[(hertz > 300) & (hertz < 3400)].sum()
    assert power[hertz > 4200].sum() < 1e-4 * inside
    assert abs(len(heard) - len(order)) <= 2


def test_speech_bounds_find_speech_between_silences(recipe: Recipe, clips: Path) -> None:
    word = recipe("data").load_audio(clips / "digit-seven.flac")
    silence = np.zeros(8000, np.float32)
    start, end = recipe("augment").speech_bounds(np.concatenate([silence, word, silence]))
    assert 8000 <= start < 8000 + len(word) // 2 < end <= 8000 + len(word) + 160


def test_one_seed_gives_one_result_and_another_seed_another(recipe: Recipe, order: Wave) -> None:
    augment = recipe("augment")

    def make(seed: int) -> Wave:
        rng = np.random.default_rng(seed)
        made: Wave = augment.change_voice(order, rng, augment.Strength())
        made = augment.change_channel(made, rng, augment.Strength(), [order])
        assert made.dtype == np.float32
        assert np.abs(made).max() <= 1
        assert np.isfinite(made).all()
        return made

    made = [make(seed) for seed in range(12)]
    for seed in range(12):
        np.testing.assert_array_equal(made[seed], make(seed))
    assert len({wave.tobytes() for wave in made}) == 12


def test_the_channel_keeps_length(recipe: Recipe, order: Wave) -> None:
    augment = recipe("augment")
    for seed in range(20):
        heard = augment.change_channel(order, np.random.default_rng(seed), augment.Strength(), [order])
        assert heard.shape == order.shape
