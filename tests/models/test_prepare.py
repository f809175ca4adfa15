from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Recipe = Callable[[str], Any]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def material(recipe: Recipe, clips: Path) -> list[Any]:
    """Clips of every group, real and synthetic: the committed clips' sounds with texts made to fit."""
    render, data = recipe("render"), recipe("data")
    word = data.load_audio(clips / "digit-seven.flac")
    order = data.load_audio(clips / "coffee-mocha.flac")
    wake = data.load_audio(clips / "wake-alexa.flac")
    made = []
    for kind in ("real", "synthetic"):
        group = "fsdd" if kind == "real" else "digits"
        made += [render.clip_of(word, digit, group, f"{kind}-{s}", kind) for s in "ab" for digit in DIGITS]
        made += [render.clip_of(word, "seven", group, f"{kind}-c", kind)]  # has not said every digit
        made += [render.clip_of(order, "an order", "coffee", "x", kind)]
        made += [render.clip_of(wake, "alexa", "wakeword", "x", kind)]
        made += [render.clip_of(wake, "a prompt", "asterisk", "x", kind)]
    return made


def test_a_plan_keeps_its_shares_and_repeats(recipe: Recipe, material: list[Any]) -> None:
    prepare = recipe("prepare")
    items = prepare.Planner(material, 1).plan(1.0, synthetic=True)
    assert items == prepare.Planner(material, 1).plan(1.0, synthetic=True)
    assert items != prepare.Planner(material, 2).plan(1.0, synthetic=True)
    hours: dict[tuple[str, str], float] = {}
    for item in items:
        parts = [material[i] for segment in item.segments for i in segment]
        assert len({part.kind for part in parts}) == 1
        speech = sum(part.speech_seconds + 0.1 for part in parts)
        key = item.set, parts[0].kind
        hours[key] = hours.get(key, 0) + (speech + 0.35 * len(item.segments) + 0.55) / 3600
    for group, share in prepare.SHARES.items():
        part = prepare.SYNTHETIC_SHARE[group]
        assert hours[group, "real"] == pytest.approx(share * (1 - part), abs=0.005)
        assert hours[group, "synthetic"] == pytest.approx(share * part, abs=0.005)
    assert sum(prepare.SHARES.values()) == pytest.approx(1)


def test_strings_are_of_one_speaker_who_said_every_digit(recipe: Recipe, material: list[Any]) -> None:
    items = recipe("prepare").Planner(material, 1).plan(0.5, synthetic=False)
    strings = [segment for item in items for segment in item.segments if len(segment) > 1]
    assert {len(segment) for segment in strings} == set(range(2, 11))
    for segment in strings:
        assert len({material[i].speaker for i in segment}) == 1
        assert material[segment[0]].speaker != "real-c"
    assert {item.set for item in items} == {"coffee", "digits", "strings", "wakeword", "asterisk", "mix"}
    assert not any(material[i].kind == "synthetic" for item in items for s in item.segments for i in s)


def test_a_pool_is_the_same_for_one_process_and_two(
    recipe: Recipe, material: list[Any], tmp_path: Path
) -> None:
    prepare, pool = recipe("prepare"), recipe("pool")
    items = prepare.Planner(material, 3).plan(0.02, synthetic=True)
    noises = [material[20].wave()]
    for jobs in (1, 2):
        prepare.build_pool(tmp_path / str(jobs), items, material, noises, jobs)
    one, two = (pool.load_pool(tmp_path / str(jobs)) for jobs in (1, 2))
    np.testing.assert_array_equal(one.features, two.features)
    assert one.records == two.records
    assert len(one.records) == len(items)
    for item, entry in zip(items, one.records, strict=True):
        assert entry.text == " ".join(material[i].text for segment in item.segments for i in segment)
        assert entry.frames == 4 * -(-round(entry.seconds * 16000) // 640)
        assert [word for word, _, _ in entry.words] in ([], entry.text.split())
        assert all(0 <= start < end <= entry.seconds for _, start, end in entry.words)
    assert any(entry.words for entry in one.records)
    rows = prepare.report(tmp_path / "1")
    assert rows["utterances"] == len(items)
    assert 0.1 < rows["synthetic_share"] < 0.5


def test_the_test_sets_alone_are_those_that_all_sets_have(
    recipe: Recipe, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, pool, data = recipe("prepare"), recipe("pool"), recipe("data")
    monkeypatch.setattr(prepare, "STRINGS", 3)
    monkeypatch.setattr(prepare, "read_prompts", lambda wide=False: ([], None))

    def one(name: str, sound: str, text: str, table: str, split: str = "test") -> Any:
        return data.Utterance(name, clips / f"{sound}.flac", text, table, split, "x", 0.4)

    sounds = ("digit-three", "digit-seven")
    utterances = [
        *(one(f"x/{digit}_{take}", sounds[take], digit, "fsdd") for digit in DIGITS for take in range(2)),
        one("order", "coffee-mocha", "a mocha", "coffee"),
        one("learned", "coffee-mocha", "a mocha", "coffee", "train"),
        one("call", "wake-alexa", "alexa", "wakeword"),
    ]
    noise = data.load_audio(clips / "digit-three.flac")
    prepare.write_tests(tmp_path / "alone", utterances)
    prepare.build_evals(tmp_path / "all", utterances, [noise])
    written = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert written == ["coffee_test", "digits_test", "strings_test", "wakeword_test"]
    for name in written:
        have, want = (pool.load_pool(tmp_path / part / name) for part in ("alone", "all"))
        assert have.records == want.records
        np.testing.assert_array_equal(have.audio, want.audio)


def test_evaluation_sets_have_harder_variants_with_equal_texts(
    recipe: Recipe, clips: Path, tmp_path: Path
) -> None:
    prepare, pool, data = recipe("prepare"), recipe("pool"), recipe("data")
    takes = [
        data.Utterance(f"x/{digit}_{take}", clips / f"digit-{sound}.flac", digit, "fsdd", "test", "x", 0.4)
        for digit in DIGITS
        for take, sound in enumerate(("three", "seven"))
    ]
    strings = prepare.digit_strings(takes, 4, seed=1)
    prepare.write_eval(tmp_path / "strings_test", strings, [strings[0][1]])
    plain = pool.load_pool(tmp_path / "strings_test")
    for variant in ("noise10", "phone"):
        harder = pool.load_pool(tmp_path / f"strings_test_{variant}")
        assert [r.text for r in harder.records] == [r.text for r in plain.records]
        assert [r.words for r in harder.records] == [r.words for r in plain.records]
        assert not np.array_equal(harder.audio, plain.audio)
    for entry in plain.records:
        assert 3 <= len(entry.text.split()) <= 8
        assert [word for word, _, _ in entry.words] == entry.text.split()
        ends = [end for _, _, end in entry.words]
        assert ends == sorted(ends)
        # The stored features are those of the stored samples.
        expected = recipe("render").features_of(plain.samples(entry))
        np.testing.assert_array_equal(plain.mel(entry), expected)
