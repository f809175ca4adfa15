"""The written form that the bundle learns and is scored in: lower case a-z, apostrophe, blanks (ours).

Numbers and abbreviations stand as they are spoken ("press 1" is "press one", "PBX" is "p b x"), so that word
error rates count what was heard. The rules beyond that serve one list, the transcripts of Debian's
asterisk-core-sounds-en; the tables under shared/data/speech are normalised already and pass through
unchanged.
"""

from __future__ import annotations

import re

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAKE_PHRASES = ("alexa", "computer", "jarvis", "smart mirror", "snowboy", "view glass")

# Abbreviations and symbols of the prompt list as the speaker says them; matched as whole tokens, case kept,
# because "IS" or "it" must not become letters.
_SPOKEN = {
    "A.M.": "a m",
    "P.M.": "p m",
    "PBX": "p b x",
    "PBX.": "p b x",
    "IVR": "i v r",
    "IAX": "i a x",
    "IP": "i p",
    "H.323": "h three two three",
    "MGCP": "m g c p",
    "USB": "u s b",
    "3D": "three d",
    "28.8": "twenty eight point eight",
    "www.asterisk.org.": "w w w dot asterisk dot org",
    "#": "pound",
    "*": "star",
    "thru": "through",
    "both_help": "both help",
}

# Spelling errors of the list: the recording says the word, so the reference must spell it.
_SPELLING = {
    "umute": "unmute",
    "fourtieth": "fortieth",
    "exclaimation": "exclamation",
    "represenatives": "representatives",
    "indentified": "identified",
    "witheld": "withheld",
}

# What the recognizers that transcribed the coffee orders wrote for words that no order holds. Only training
# texts are corrected: the references of development and test sets stay as they are published.
_ORDERS = {
    "brue": "brew", "bro": "brew", "brut": "brew", "bruce": "brew", "screw": "brew", "through": "brew",
    "unlike": "i'd like", "milker": "mocha",
}  # fmt: skip

# Prefixes that the list sets off by a hyphen but that are one word with what follows.
_PREFIXES = ("re", "un", "de")

_NON_SPEECH = re.compile(r"[\[<(](?!note:)[^\])>]*[\])>]")


def correct_order(text: str) -> str:
    """A coffee order of the training split with its transcribers' known slips put right."""
    return " ".join(_ORDERS.get(word, word) for word in text.split())


def normalise(text: str) -> str:
    """Spoken form of `text` in the alphabet a-z, apostrophe and blank.

    Raises ValueError if a number of two or more digits is left: how it is read aloud cannot be known from its
    spelling.
    """
    words: list[str] = []
    for token in text.replace("...", " ").split():
        spoken = _SPOKEN.get(token) or _SPOKEN.get(token.rstrip(".,;:!?"))
        words.extend((spoken or token).split())
    joined = " ".join(words).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    joined = re.sub(rf"\b({'|'.join(_PREFIXES)})-(?=[a-z])", r"\1", joined)
    number = re.search(r"\d{2,}|\d\.\d", joined)
    if number:
        raise ValueError(f"cannot tell how {number.group()!r} is read aloud in {text!r}")
    joined = re.sub(r"\d", lambda match: f" {DIGITS[int(match.group())]} ", joined)
    # An apostrophe counts inside a word only; quotation marks do not.
    joined = re.sub(r"[^a-z']+", " ", joined)
    joined = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", joined)
    fixed = [_SPELLING.get(word, word) for word in joined.split()]
    return " ".join(fixed).replace("unindentified", "unidentified")


def prompt_text(name: str, written: str) -> str | None:
    """Spoken form of one entry of core-sounds-en.txt, or None where it is not all readable speech.

    Dropped: entries with a description of a sound ("[ascending tones]", "<beep>", "(1 second of silence)")
    and entries with numbers whose reading is unknown. A symbol in brackets after its name ("dash [-]") is a
    note and goes.
    """
    if name.startswith("letters/"):
        written = re.sub(r"\[.*?\]", "", written)
    written = re.sub(r"\(note:.*?\)", "", written)
    if _NON_SPEECH.search(written):
        return None
    try:
        return normalise(written) or None
    except ValueError:
        return None
