import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Recipe = Callable[[str], Any]


def order(recipe: Recipe, text: str, slots: dict[str, str], split: str = "train", sure: bool = True) -> Any:
    return recipe("data").Utterance(text, Path("x"), text, "coffee", split, "x", 1.0, slots, sure)


def test_orders_recombine_training_values_only(recipe: Recipe) -> None:
    known = [
        order(recipe, "make me a medium medium roast mocha",
              {"size": "medium", "roast": "medium roast", "coffeeDrink": "mocha"}),
        order(recipe, "make me an iced mocha with milk", {"coffeeDrink": "iced mocha", "milkAmount": "milk"}),
        order(recipe, "make me a latte", {"coffeeDrink": "latte"}),
        order(recipe, "brut a latte", {"coffeeDrink": "latte"}),  # too rare an opening to be believed
        order(recipe, "make me an espresso", {"coffeeDrink": "espresso"}, split="test"),
        order(recipe, "make me a triple mocha", {"coffeeDrink": "mocha"}, sure=False),
    ]  # fmt: skip
    grammar = recipe("phrases").CoffeeGrammar(known)
    rng = np.random.default_rng(0)
    drawn = {grammar.draw(rng) for _ in range(300)}
    assert "make me a medium medium roast latte" in drawn
    assert "make me an iced mocha" in drawn
    assert len(drawn) == 3 + 3 + 3
    for text in drawn:
        assert not re.search(r"brut|espresso|triple|<|a iced|an (mocha|latte|medium)", text)
    with pytest.raises(ValueError, match="no coffee orders"):
        recipe("phrases").CoffeeGrammar(known[4:])


def test_digit_strings_are_of_the_asked_lengths(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    lengths = {len(recipe("phrases").digit_string(rng, 3, 5).split()) for _ in range(100)}
    assert lengths == {3, 4, 5}
