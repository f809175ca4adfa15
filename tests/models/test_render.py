from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Recipe = Callable[[str], Any]


@pytest.fixture
def takes(recipe: Recipe, clips: Path) -> list[Any]:
    """Two digits of one supposed speaker, and a coffee order."""
    render, data = recipe("render"), recipe("data")
    named = (("digit-three", "three"), ("digit-seven", "seven"), ("coffee-mocha", "an order"))
    return [
        render.clip_of(data.load_audio(clips / f"{n}.flac"), text, "fsdd", "x", "real") for n, text in named
    ]


def test_words_are_joined_with_gaps_and_overlaps(recipe: Recipe) -> None:
    ones = [np.ones(100, np.float32)] * 3
    joined, spans = recipe("render").join_words(ones, [50, -20])
    assert spans == [(0, 100), (150, 250), (230, 330)]
    np.testing.assert_array_equal(joined[100:150], 0)
    np.testing.assert_array_equal(joined[230:250], 2)
    assert len(joined) == 330


def test_strings_know_when_their_words_were_said(recipe: Recipe, takes: list[Any]) -> None:
    render, augment = recipe("render"), recipe("augment")
    # Without a change of channel, only hush and the faint ends of words lie outside of the spans.
    still = augment.Strength(p_room=0, p_noise=0, p_telephone=0, p_tilt=0)
    checked = 0
    for seed in range(30):
        made = render.render(render.Item("strings", ((0, 1, 0),), seed), takes, [], still)
        assert made.text == "three seven three"
        assert [word for word, _, _ in made.words] == ["three", "seven", "three"]
        inside = np.zeros(len(made.wave), bool)
        for _, start, end in made.words:
            assert 0 <= start < end <= len(made.wave) / 16000 + 1e-6
            inside[round(start * 16000) : round(end * 16000)] = True
        if made.wave[~inside].size:
            level = np.sqrt(np.mean(made.wave[inside] ** 2))
            assert np.sqrt(np.mean(made.wave[~inside] ** 2)) < 0.15 * level
            checked += 1
    assert checked > 20


def test_two_utterances_have_both_texts_and_no_partly_known_times(recipe: Recipe, takes: list[Any]) -> None:
    render = recipe("render")
    item = render.Item("mix", ((2,), (0, 1)), 5)
    made = render.render(item, takes, [], recipe("augment").Strength())
    again = render.render(item, takes, [], recipe("augment").Strength())
    assert made.text == "an order three seven"
    assert made.words == ()
    np.testing.assert_array_equal(made.wave, again.wave)


def test_features_are_the_product_front_ends(recipe: Recipe, takes: list[Any]) -> None:
    features = recipe("render").features_of(takes[2].wave())
    assert features.dtype == np.float16
    assert features.shape == (4 * -(-len(takes[2].samples) // 640), 80)
    assert np.isfinite(features).all()


def test_harder_variants_are_fixed(recipe: Recipe, takes: list[Any]) -> None:
    render = recipe("render")
    wave = takes[2].wave()
    for variant in ("noise10", "phone"):
        for index in (0, 1):
            first, second = (render.harder(wave, variant, index, [wave]) for _ in range(2))
            np.testing.assert_array_equal(first, second)
            assert first.shape == wave.shape
            assert not np.allclose(first, wave, atol=1e-3)
    with pytest.raises(ValueError, match="noise10 or phone"):
        render.harder(wave, "loud", 0, [wave])
