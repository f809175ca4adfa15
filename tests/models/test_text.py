from collections.abc import Callable
from typing import Any

import pytest

Recipe = Callable[[str], Any]


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Press 1 for A.M., 2 for P.M.", "press one for a m two for p m"),
        ("You'll hear \N{RIGHT SINGLE QUOTATION MARK}it's\N{RIGHT SINGLE QUOTATION MARK} at 9 o'clock!",
         "you'll hear it's at nine o'clock"),
        ('a polite "don\'t call" menu', "a polite don't call menu"),
        ("press * or #, then call-forward", "press star or pound then call forward"),
        ("Un-indentified or witheld; please re-enter", "unidentified or withheld please reenter"),
        ("the Asterisk open source PBX.", "the asterisk open source p b x"),
        ("...for the IVR ...", "for the i v r"),
        ("can i have a twelve ounce mocha", "can i have a twelve ounce mocha"),
    ],
)  # fmt: skip
def test_text_is_written_as_it_is_spoken(recipe: Recipe, written: str, spoken: str) -> None:
    text = recipe("text")
    assert text.normalise(written) == spoken
    assert text.normalise(spoken) == spoken


def test_a_number_of_unknown_reading_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="'500'"):
        recipe("text").normalise("dial 500 now")


@pytest.mark.parametrize(
    ("name", "written", "spoken"),
    [
        ("ascending-2tone", "[ascending tones]", None),
        ("confbridge-join", "<beep ascending>", None),
        ("silence/1", "(1 second of silence)", None),
        ("vm-intro", "When done hang up. (simple tone sound plays)", None),
        ("demo-instruct", "dial extension 8500 now", None),
        ("letters/at", "at [@]", "at"),
        ("letters/space", "space [ ]", "space"),
        ("spy-iax2", 'IAX (note: does not say "2")', "i a x"),
        ("digits/oclock", "o'clock", "o'clock"),
    ],
)
def test_prompts_that_are_not_all_speech_are_dropped(
    recipe: Recipe, name: str, written: str, spoken: str | None
) -> None:
    assert recipe("text").prompt_text(name, written) == spoken
