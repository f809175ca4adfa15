from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Recipe = Callable[[str], Any]


@pytest.fixture
def parts(recipe: Recipe, clips: Path) -> dict[str, list[tuple[str, Any]]]:
    load = recipe("data").load_audio
    wave = load(clips / "digit-seven.flac")
    return {name: [(name, wave), (f"{name} again", wave)] for name in recipe("join").SHARES}


def test_a_stream_has_its_texts_in_order_with_pauses_between(
    recipe: Recipe, parts: dict[str, list[tuple[str, Any]]]
) -> None:
    join = recipe("join")
    longest, quiet = 0.0, 0
    for seed in range(20):
        text, wave = join.stream(parts, 3, np.random.default_rng(seed))
        again, same = join.stream(parts, 3, np.random.default_rng(seed))
        assert (text, wave.tolist()) == (again, same.tolist())
        words = text.replace(" again", "").split()
        assert len(words) == 3
        assert set(words) <= set(join.SHARES)
        assert float(np.abs(wave).max()) <= 1.0
        pauses = len(wave) / join.RATE - 3 * len(parts["coffee"][0][1]) / join.RATE
        assert 3 * join.PAUSE[0] - 0.01 <= pauses <= 3 * join.PAUSE[1] + 0.61
        longest = max(longest, pauses)
        quiet += not wave[-int(0.3 * join.RATE) :].any()
    assert longest > 5.0
    assert 0 < quiet < 20  # some streams are silent between their utterances, some hiss


def test_parts_come_without_the_silence_around_them(recipe: Recipe, clips: Path) -> None:
    join, data = recipe("join"), recipe("data")

    def one(name: str, set_name: str, text: str) -> Any:
        path = clips / f"{name}.flac"
        return data.Utterance(name, path, text, set_name, "train", "a", 1.0)

    digits = [one("digit-seven", "fsdd", word) for word in recipe("prepare").DIGITS]
    found = join.parts_of(
        [*digits, one("coffee-mocha", "coffee", "x y"), one("wake-alexa", "wakeword", "alexa")], 4, 1
    )
    assert {name: len(members) for name, members in found.items()} == {
        "coffee": 1, "strings": 4, "wakeword": 1, "asterisk": 0,
    }  # fmt: skip
    assert found["coffee"][0][0] == "x y"
    assert 0 < len(found["coffee"][0][1]) <= len(data.load_audio(clips / "coffee-mocha.flac"))
    assert all(3 <= len(text.split()) <= 8 for text, _ in found["strings"])
