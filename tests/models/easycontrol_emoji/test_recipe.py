"""Names, prompts, edges and LoRAs of the image bundle's recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Recipe = Callable[[str], Any]
NAMES = ["red-apple", "fox", "soccer-ball", "frog", "rocket", "house", "pizza", "dog-face", "cat", "owl"] * 3


@pytest.fixture
def pictures(drawn: Recipe, tmp_path: Path) -> Any:
    """Two drawings: a red disc in one style, a blue square in the other."""
    module = drawn("pictures")
    side = module.DRAWN
    y, x = np.mgrid[:side, :side] - side / 2
    pixels = np.zeros((1, 2, side, side, 4), np.uint8)
    pixels[0, 0][np.hypot(x, y) < side * 0.45] = (220, 20, 20, 255)
    pixels[0, 1][np.maximum(abs(x), abs(y)) < side * 0.4] = (20, 20, 220, 255)
    np.savez(tmp_path / "pictures.npz", names=np.array(["thing"]), pixels=pixels)
    return module.Pictures(tmp_path / "pictures.npz")


def test_names_say_what_is_seen(drawn: Recipe) -> None:
    names = drawn("names")
    for icon in ("red-apple", "fox", "face-with-monocle"):
        assert names.wanted(icon), icon
    for icon in (
        "man-red-hair",
        "one-oclock",
        "up-arrow",
        "keycap-1",
        "face-with-hand-over-mouth",
        "1st-place",
    ):
        assert not names.wanted(icon), icon


def test_a_tenth_is_held_out_in_all_styles(drawn: Recipe) -> None:
    names = drawn("names")
    icons = [f"name{number}" for number in range(95)]
    unseen = names.held_out(icons)
    assert len(unseen) == 9
    assert unseen == names.held_out(icons)
    assert unseen < set(icons)


def test_prompts_name_style_and_background_and_sometimes_no_emoji(drawn: Recipe) -> None:
    names = drawn("names")
    assert names.plain("owl", "pink", "noto") == "an owl on a pink background, noto style"
    rng = np.random.default_rng(0)
    told = [names.paraphrase(rng, "red-apple", "blue", "flat", 0.3) for _ in range(300)]
    assert all("blue" in text and "flat" in text for text in told)
    nameless = [text for text in told if "red apple" not in text]
    assert 60 < len(nameless) < 120
    assert all("emoji" in text for text in nameless)


def test_words_of_training_names_are_one_piece(drawn: Recipe, tmp_path: Path) -> None:
    from realtide.engines.easycontrol.tokenizer import PromptTokenizer

    names = drawn("names")
    icons = sorted({f"{a}-{b}" for a in NAMES[:10] for b in ("big", "small", "round")})
    icons = [icon.replace("_", "") for icon in icons if icon.count("-") <= 2]
    names.train_tokenizer(icons, tmp_path / "tokenizer.model")
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.model", names.TOKENS)
    unseen = names.held_out(icons)
    seen = next(icon for icon in icons if icon not in unseen)
    prompt = names.plain(seen, "blue", "flat")
    assert tokenizer.count(names.spoken(seen)) == len(seen.split("-")) + 1
    assert tokenizer.count(prompt) <= names.TOKENS
    assert len(tokenizer.encode(prompt)) == names.TOKENS


def test_edges_are_where_colours_change(drawn: Recipe, pictures: Any) -> None:
    module = drawn("pictures")
    scene = module.centred("thing", "flat")
    pixels = module.render(pictures, scene)
    assert pixels.shape == (3, 64, 64)
    lines = module.edges(pixels)
    y, x = np.nonzero(lines)
    radius = np.hypot(y - 31.5, x - 31.5)
    want = scene.side * 0.45
    assert (abs(radius - want) < 1.5).all()
    # A closed line: every eighth of the circle has some of it.
    assert len(set(np.floor((np.arctan2(y - 31.5, x - 31.5) + np.pi) / (np.pi / 4)))) >= 8
    assert not module.edges(np.zeros((3, 64, 64), np.float32)).any()
    condition = module.as_condition(lines)
    assert set(np.unique(condition)) == {-1.0, 1.0}
    assert module.as_condition(np.zeros((96, 64), bool)).shape == (3, 64, 64)


def test_scenes_lie_in_the_picture(drawn: Recipe, pictures: Any) -> None:
    module = drawn("pictures")
    rng = np.random.default_rng(1)
    for size in (*module.SIZES, *module.UNTRAINED) * 20:
        scene = module.random_scene(rng, "thing", "noto", size)
        assert all(
            at >= 0 and at + scene.side <= length for at, length in zip(scene.corner, size, strict=True)
        )
        assert module.render(pictures, scene).shape == (3, size[1], size[0])
    assert not set(module.SIZES) & set(module.UNTRAINED)


def test_agreement_of_edges(drawn: Recipe) -> None:
    agreement = drawn("evaluate").agreement
    lines = np.zeros((20, 20), bool)
    lines[5, 2:18] = True
    moved, far = np.roll(lines, 1, 0), np.roll(lines, 5, 0)
    assert agreement(lines, lines) == agreement(lines, moved) == 1.0
    assert agreement(lines, far) == 0.0
    half = lines.copy()
    half[:, 10:] = False
    assert 0.4 < agreement(lines, half) < 0.7
    assert agreement(lines, np.zeros_like(lines)) == 0.0


def test_a_fresh_lora_adds_nothing_and_has_the_releases_names(drawn: Recipe) -> None:
    from realtide.engines.easycontrol import loras

    learn, train = drawn("learn"), drawn("train_lora")
    config = learn.config()
    lora = train.LoraWeights(config)
    named = {name: value.numpy() for name, value in lora.named().items()}
    want = {f"{n}.{way}.weight" for _, _, n in loras.names(config.transformer) for way in ("down", "up")}
    assert set(named) == want
    assert not any(value.any() for name, value in named.items() if ".up." in name)
    stacked = loras.stacked(config.transformer, named, 1.0)
    for (down, up), block in zip(lora.blocks(), range(config.transformer.blocks), strict=True):
        np.testing.assert_array_equal(down.detach().numpy(), stacked[f"down_{block}"])
        np.testing.assert_array_equal(up.detach().numpy(), stacked[f"up_{block}"])


def test_trained_as_it_is_served(drawn: Recipe) -> None:
    """The training's tokens are the engine's."""
    from realtide.engines.easycontrol.packing import pack

    latents = np.random.default_rng(0).standard_normal((2, 16, 6, 8)).astype(np.float32)
    have = drawn("learn").packed(torch.from_numpy(latents)).numpy()
    np.testing.assert_array_equal(have, np.stack([pack(one, 2) for one in latents]))


def test_attention_for_training_is_the_models(drawn: Recipe) -> None:
    from realtide.engines.easycontrol import transformer

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    torch.testing.assert_close(drawn("learn").plainly(q, k, v), transformer.attend(q, k, v))
