from collections.abc import Callable
from typing import Any

import jiwer
import numpy as np
import pytest

Recipe = Callable[[str], Any]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("one two three", "one two three", (0, 0, 0, 3)),
        ("one two three", "one three", (0, 0, 1, 3)),
        ("one two three", "one two two three", (0, 1, 0, 3)),
        ("one two three", "one four three", (1, 0, 0, 3)),
        ("one two", "", (0, 0, 2, 2)),
        ("", "one", (0, 1, 0, 0)),
    ],
)
def test_alignment_counts(
    recipe: Recipe, reference: str, hypothesis: str, expected: tuple[int, int, int, int]
) -> None:
    found = recipe("score").align(reference, hypothesis)
    assert (found.substitutions, found.insertions, found.deletions, found.words) == expected


def test_alignment_agrees_with_jiwer(recipe: Recipe) -> None:
    score = recipe("score")
    rng = np.random.default_rng(1)
    for _ in range(200):
        reference = " ".join(rng.choice(list("abcd"), size=int(rng.integers(1, 9))))
        hypothesis = " ".join(rng.choice(list("abcd"), size=int(rng.integers(1, 9))))
        theirs = jiwer.process_words(reference, hypothesis)
        assert score.align(reference, hypothesis).rate == pytest.approx(theirs.wer)


ORDER = {"coffeeDrink": "coffee", "size": "medium", "roast": "medium roast", "milkAmount": "a bit of milk"}


@pytest.mark.parametrize(
    ("said", "present", "right"),
    [
        ("a medium medium roast coffee with a bit of milk", True, True),
        ("A medium, medium roast coffee, with a bit of milk.", True, True),
        ("a medium roast coffee with a bit of milk", True, False),
        ("a medium medium roast iced coffee with a bit of milk", True, False),
        ("a medium medium roast coffee with a bit of soy milk", False, False),
        ("a medium medium roast coffees with a bit of milk", False, False),
        ("", False, False),
    ],
)
def test_slots_by_the_datas_rule_and_by_the_stricter_one(
    recipe: Recipe, said: str, present: bool, right: bool
) -> None:
    score = recipe("score")
    assert score.slots_present(said, ORDER) is present
    assert score.slots_right(said, ORDER) is right


def test_a_set_is_scored_over_sure_clips_but_slots_over_all(recipe: Recipe) -> None:
    score, pool = recipe("score"), recipe("pool")

    def clip(name: str, text: str, sure: bool) -> Any:
        return pool.Record(
            name, 0, 0, text, "coffee", "test", "x", "real", 1.0, slots={"size": "large"}, sure=sure
        )

    records = [clip("a", "large latte", True), clip("b", "large mocha", True), clip("c", "lard mocha", False)]
    result = score.score(records, {"a": "Large latte", "b": "large coca", "c": "large mocha"})
    assert result.utterances == 3
    assert (result.errors.substitutions, result.errors.words) == (1, 4)
    assert result.rate == 0.25
    assert result.exact == pytest.approx(1 / 3)
    assert result.slots == 1.0
    assert result.slots_strict == 1.0
    assert result.interval[0] <= 0.25 <= result.interval[1]
    with pytest.raises(KeyError):
        score.score(records, {"a": "large latte"})
    with pytest.raises(ValueError, match="nothing to score"):
        score.score([], {})


def test_the_interval_narrows_with_more_clips_and_is_repeatable(recipe: Recipe) -> None:
    score = recipe("score")
    few = [score.Errors(int(k % 4 == 0), 0, 0, 5) for k in range(20)]
    low, high = score.bootstrap(few)
    assert low < 0.05 < high
    assert score.bootstrap(few) == (low, high)
    low_many, high_many = score.bootstrap(few * 30)
    assert high_many - low_many < 0.4 * (high - low)
