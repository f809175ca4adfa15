"""The shipped bundle: whole, small, and its images do what conditions and prompts say.

The shapes here are drawn by the tests: the emoji of the recipe are not in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from realtide.bundle import load_bundle, verify
from realtide.engines.easycontrol.config import (
    ConditionConfig,
    PooledConfig,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
)

Recipe = Callable[[str], Any]
ROOT = Path(__file__).parents[3]
SCORES = ROOT / "benchmarks" / "results" / "easycontrol_emoji_scores.json"
SIDE = 64


@pytest.fixture(scope="module")
def artist(drawn: Recipe, bundle: Path) -> Any:
    return drawn("draw").Artist(bundle)


def shapes(colour: str, ground: str = "white") -> list[Image.Image]:
    """A disc, a square, a triangle, a ring and a bar."""
    found = []
    for number in range(5):
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        pen = ImageDraw.Draw(picture)
        if number == 0:
            pen.ellipse((8, 12, 52, 56), fill=colour)
        elif number == 1:
            pen.rectangle((14, 8, 56, 50), fill=colour)
        elif number == 2:
            pen.polygon([(32, 6), (58, 54), (6, 54)], fill=colour)
        elif number == 3:
            pen.ellipse((6, 6, 58, 58), outline=colour, width=12)
        else:
            pen.polygon([(6, 40), (50, 6), (58, 16), (14, 52)], fill=colour)
        found.append(picture)
    return found


def planes(picture: Image.Image) -> np.ndarray:
    """[3, h, w] in -1 .. 1."""
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1


def test_the_bundle_is_whole_and_small(bundle: Path) -> None:
    found = load_bundle(bundle)
    assert verify(found) == []
    assert sum(file.size for file in found.manifest.files) <= 11_000_000


def test_all_bundles_together_stay_small() -> None:
    files = [
        path for path in (ROOT / "models").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= 25_000_000


def test_its_shapes_are_the_recipe_s(drawn: Recipe, bundle: Path) -> None:
    module = drawn("shapes")
    parts = load_bundle(bundle).manifest.architecture
    vae = VaeConfig.from_dict(parts["vae"])
    assert vae == module.vae_config(vae.scaling, vae.shift)
    config = module.image_config(vae)
    assert TransformerConfig.from_dict(parts["transformer"]) == config.transformer
    assert ConditionConfig.from_dict(parts["conditions"]) == config.conditions
    assert SamplerConfig.from_dict(parts["sampler"]) == config.sampler
    text = TextConfig.from_dict(parts["text"])
    assert text == module.text_config(text.vocab)
    assert PooledConfig.from_dict(parts["pooled"]) == module.pooled_config(text.vocab)


def test_the_card_has_the_figures_that_were_measured(drawn: Recipe, bundle: Path) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    assert drawn("card").filled(card, scores) == card
    assert load_bundle(bundle).manifest.scores == scores


def test_backgrounds_are_as_told(drawn: Recipe, artist: Any) -> None:
    names = drawn("names")
    for seed, (name, colour) in enumerate(names.BACKGROUNDS.items()):
        pixels = artist.draw(names.plain("emoji", name, "flat"), (SIDE, SIDE), seed)
        assert pixels.shape == (3, SIDE, SIDE)
        corner = (pixels[:, :4, :4].mean((1, 2)) + 1) / 2
        np.testing.assert_allclose(corner, np.array(colour) / 255, atol=0.1)


def test_edges_are_followed(drawn: Recipe, artist: Any) -> None:
    """More than by the same model without them, and each drawing's more than another's."""
    evaluate, pictures, names = drawn("evaluate"), drawn("pictures"), drawn("names")
    prompt = names.plain("emoji", "blue", "flat")
    wanted = [pictures.edges(planes(one)) for one in shapes("red")]
    own, free, other = [], [], []
    made = [
        artist.draw(prompt, (SIDE, SIDE), seed, [("canny", pictures.as_condition(lines), 1.0)])
        for seed, lines in enumerate(wanted)
    ]
    for seed, lines in enumerate(wanted):
        own.append(evaluate.agreement(lines, pictures.edges(made[seed])))
        free.append(evaluate.agreement(lines, pictures.edges(artist.draw(prompt, (SIDE, SIDE), seed))))
        other.append(evaluate.agreement(lines, pictures.edges(made[seed - 1])))
    assert np.mean(own) > 1.3 * np.mean(free)
    assert np.mean(own) > 1.3 * np.mean(other)


def test_a_subject_gives_its_colour(drawn: Recipe, artist: Any) -> None:
    """Alone, and with edges, though training never had the two together."""
    evaluate, pictures, names = drawn("evaluate"), drawn("pictures"), drawn("names")
    prompt = names.plain("emoji", "white", "flat")
    apart: dict[str, list[float]] = {"subject": [], "both": [], "free": []}
    for seed, colour in enumerate(("red", "royalblue", "limegreen", "orange", "purple")):
        subject = planes(shapes(colour)[0])
        lines = pictures.as_condition(pictures.edges(planes(shapes("red")[seed])))
        told = [("subject", subject, 1.0)]
        want = evaluate.colour(subject, "white")
        for name, conditions in (
            ("subject", told),
            ("both", [("canny", lines, 1.0), *told]),
            ("free", []),
        ):
            made = artist.draw(prompt, (SIDE, SIDE), seed, conditions)
            apart[name].append(float(np.abs(evaluate.colour(made, "white") - want).mean()))
    assert np.mean(apart["subject"]) < 0.7 * np.mean(apart["free"])
    assert np.mean(apart["both"]) < 0.7 * np.mean(apart["free"])


def test_a_size_that_was_never_trained(drawn: Recipe, artist: Any) -> None:
    prompt = drawn("names").plain("emoji", "green", "noto")
    pixels = artist.draw(prompt, (96, 64), 1)
    assert pixels.shape == (3, 64, 96)
    assert np.isfinite(pixels).all()
    corner = (pixels[:, :4, :4].mean((1, 2)) + 1) / 2
    np.testing.assert_allclose(corner, np.array(drawn("names").BACKGROUNDS["green"]) / 255, atol=0.1)


def test_int8_draws_the_same(drawn: Recipe, bundle: Path, artist: Any) -> None:
    """Edges, prompt and seed give nearly the picture that float32 gives."""
    pictures, names = drawn("pictures"), drawn("names")
    narrow = drawn("draw").Artist(bundle, precision="int8")
    prompt = names.plain("emoji", "blue", "flat")
    for seed, shape in enumerate(shapes("red")[:2]):
        sketch = [("canny", pictures.as_condition(pictures.edges(planes(shape))), 1.0)]
        wide, found = (one.draw(prompt, (SIDE, SIDE), seed, sketch) for one in (artist, narrow))
        assert 0 < np.abs(found - wide).mean() < 0.05
    narrow.close()
