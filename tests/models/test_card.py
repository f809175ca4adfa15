"""The model card says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Recipe = Callable[[str], Any]
ROOT = Path(__file__).parents[2]
CARD = ROOT / "models" / "ancat-commands-en" / "README.md"
SCORES = ROOT / "benchmarks" / "results" / "ancat_commands_en_scores.json"


def test_the_card_has_the_figures_that_were_measured(recipe: Recipe) -> None:
    card = recipe("card")
    text = CARD.read_text(encoding="utf-8")
    assert card.filled(text, json.loads(SCORES.read_text(encoding="utf-8"))) == text


def test_figures_are_replaced_and_other_lines_stay(recipe: Recipe) -> None:
    card = recipe("card")
    values = {
        "utterances": 3, "rate": 0.125, "interval": [0.0, 0.5], "exact": 0.5, "slots": None,
        "lookahead_mean_ms": 99.6,
    }  # fmt: skip
    before = "text\n| digits | `digits_test` | 1 | 2 | 3 | 4 | 5 |\n| a | b | c |"
    after = card.filled(before, {"digits_test": values})
    assert after == "text\n| digits | `digits_test` | 3 | 12.5 %, 0.0-50.0 | 50.0 % |  | 100 |\n| a | b | c |"
    with pytest.raises(KeyError):
        card.filled(before, {})
