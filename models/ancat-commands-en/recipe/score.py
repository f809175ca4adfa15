"""Scores of hypotheses: word error rate, exact matches, coffee slots (ours; alignment by Levenshtein).

    python models/ancat-commands-en/recipe/score.py --references OUT/eval/coffee_test --hypotheses
    hypotheses.json

where hypotheses.json maps an utterance's name to the recognized text. Both sides are normalised by text.py
first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pool import Record, load_pool
from text import normalise

_SAMPLES = 2000  # bootstrap resamples
_SEED = 2305


@dataclass(frozen=True, slots=True)
class Errors:
    """Word errors of a minimum-edit alignment, and the reference's words."""

    substitutions: int
    insertions: int
    deletions: int
    words: int

    @property
    def rate(self) -> float:
        """Word error rate; of an empty reference, the number of insertions."""
        return (self.substitutions + self.insertions + self.deletions) / max(self.words, 1)

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.words + other.words,
        )


def align(reference: str, hypothesis: str) -> Errors:
    """Word errors between two normalised texts; of the cheapest alignments one with most substitutions."""
    ref, hyp = reference.split(), hypothesis.split()
    # cost[i][j] = (errors, insertions + deletions, substitutions, insertions, deletions) for ref[:i], hyp[:j]
    row = [(j, j, 0, j, 0) for j in range(len(hyp) + 1)]
    for i, word in enumerate(ref, 1):
        above = row
        row = [(i, i, 0, 0, i)]
        for j, said in enumerate(hyp, 1):
            e, m, s, ins, d = above[j - 1]
            same = 0 if word == said else 1
            best = (e + same, m, s + same, ins, d)
            e, m, s, ins, d = row[j - 1]
            best = min(best, (e + 1, m + 1, s, ins + 1, d))
            e, m, s, ins, d = above[j]
            row.append(min(best, (e + 1, m + 1, s, ins, d + 1)))
    _, _, substitutions, insertions, deletions = row[-1]
    return Errors(substitutions, insertions, deletions, len(ref))


def slots_present(hypothesis: str, slots: Mapping[str, str]) -> bool:
    """True if every labelled slot value stands literally, as whole words, in the normalised hypothesis.

    The rule that the data's own column `sure` is made by.
    """
    text = f" {normalise(hypothesis)} "
    return all(f" {value} " in text for value in slots.values())


def slots_right(hypothesis: str, slots: Mapping[str, str]) -> bool:
    """Stricter than `slots_present`: values take turns, and none may be a mere part of another value.

    "coffee" does not stand in "iced coffee", "milk" not in "soy milk", the size "medium" not in "medium
    roast". Longer labelled values are taken out first, one occurrence each; what a value may not follow or
    precede is in `_LONGER`.
    """
    text = f" {normalise(hypothesis)} "
    for slot, value in sorted(slots.items(), key=lambda pair: -len(pair[1])):
        before, after = _LONGER.get(slot, ((), ()))
        pattern = "".join(rf"(?<! {word})" for word in before)
        pattern += rf" {re.escape(value)}(?= )" + "".join(rf"(?! {word} )" for word in after)
        text, found = re.subn(pattern, " |", text, count=1)
        if not found:
            return False
    return True


# Words that make another value of a slot's value when they stand before or after it.
_LONGER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "coffeeDrink": (("iced", "house", "drip"), ()),
    "milkAmount": (("soy", "almond", "skim", "whole", "of", "some"), ()),
    "sugarAmount": (("brown", "of", "some"), ()),
    "size": ((), ("roast",)),
}


@dataclass(frozen=True, slots=True)
class Score:
    """Result on one set; `interval` is the 95 percent bootstrap interval of the word error rate.

    `exact` is the share of utterances recognized word for word. `slots` is the share of clips with all
    human-labelled slot values literally in the text (`slots_present`), `slots_strict` by `slots_right`; both
    are None where a set has no labels, and count all clips, while word errors count `sure` clips only.
    """

    utterances: int
    errors: Errors
    rate: float
    interval: tuple[float, float]
    exact: float
    slots: float | None
    slots_strict: float | None


def score(records: Sequence[Record], hypotheses: Mapping[str, str]) -> Score:
    """Score `hypotheses` (by utterance name) against `records`.

    Raises KeyError if an utterance has no hypothesis, ValueError if there are no records.
    """
    if not records:
        raise ValueError("nothing to score")
    texts = {record.name: normalise(hypotheses[record.name]) for record in records}
    sure = [record for record in records if record.sure]
    each = [align(normalise(record.text), texts[record.name]) for record in sure]
    total = sum(each, Errors(0, 0, 0, 0))
    labelled = [record for record in records if record.slots]
    present = [slots_present(texts[record.name], record.slots) for record in labelled]
    right = [slots_right(texts[record.name], record.slots) for record in labelled]
    return Score(
        utterances=len(records),
        errors=total,
        rate=total.rate,
        interval=bootstrap(each),
        exact=float(np.mean([normalise(r.text) == texts[r.name] for r in records])),
        slots=float(np.mean(present)) if present else None,
        slots_strict=float(np.mean(right)) if right else None,
    )


def bootstrap(errors: Sequence[Errors], samples: int = _SAMPLES, seed: int = _SEED) -> tuple[float, float]:
    """95 percent interval of the pooled word error rate, utterances redrawn (Bisani and Ney, ICASSP 2004)."""
    wrong: npt.NDArray[np.int64] = np.array([e.substitutions + e.insertions + e.deletions for e in errors])
    words: npt.NDArray[np.int64] = np.array([e.words for e in errors])
    drawn = np.random.default_rng(seed).integers(len(errors), size=(samples, len(errors)))
    rates = wrong[drawn].sum(axis=1) / np.maximum(words[drawn].sum(axis=1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", type=Path, required=True, help="pool with the reference texts")
    parser.add_argument("--hypotheses", type=Path, required=True, help="JSON object: name to text")
    args = parser.parse_args()
    result = score(
        load_pool(args.references).records, json.loads(args.hypotheses.read_text(encoding="utf-8"))
    )
    print(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
