"""Sentences for the synthetic voices, drawn from what the *training* texts alone teach (ours)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from data import Utterance
from text import DIGITS

_LEAST_OPENERS = (
    3  # an order's first words must occur this often, or they are taken for a transcription error
)


class CoffeeGrammar:
    """Order templates and slot values of the coffee set's training texts, recombined freely.

    A template is a training text with every human-labelled slot value replaced by the slot's name. Raises
    ValueError if there are no texts to learn from.
    """

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        templates: list[tuple[str, ...]] = []
        values: dict[str, list[str]] = defaultdict(list)
        for u in utterances:
            if u.set == "coffee" and u.split == "train" and u.sure:
                templates.append(self._template(u.text, u.slots))
                for slot, value in u.slots.items():
                    values[slot].append(value)
        openers = Counter(template[0] for template in templates)
        self._templates = [t for t in templates if openers[t[0]] >= _LEAST_OPENERS]
        if not self._templates:
            raise ValueError("no coffee orders to learn a grammar from")
        self._values = dict(values)

    @staticmethod
    def _template(text: str, slots: dict[str, str]) -> tuple[str, ...]:
        # Longest values first: "medium roast" must be taken before the size "medium" is looked for.
        for slot, value in sorted(slots.items(), key=lambda pair: -len(pair[1])):
            text = re.sub(rf"\b{re.escape(value)}\b", f"<{slot}>", text, count=1)
        opener, *rest = re.split(r"(?=<)", text, maxsplit=1)
        # The article belongs to the slot that follows it.
        return re.sub(r"\ban$", "a", opener.strip()), *rest

    def draw(self, rng: np.random.Generator) -> str:
        """One order."""
        text = " ".join(self._templates[int(rng.integers(len(self._templates)))])
        text = re.sub(r"<(\w+)>", lambda m: self._value(m.group(1), rng), text)
        text = re.sub(r"\ban? (?=[aeio])", "an ", text)
        return re.sub(r"\ban (?=[^aeio])", "a ", text)

    def _value(self, slot: str, rng: np.random.Generator) -> str:
        values = self._values[slot]
        return values[int(rng.integers(len(values)))]


def digit_string(rng: np.random.Generator, shortest: int = 2, longest: int = 10) -> str:
    """Uniform digits, uniform length."""
    return " ".join(DIGITS[int(d)] for d in rng.integers(10, size=int(rng.integers(shortest, longest + 1))))
