"""A bundle on ONNX Runtime, against the modules; and what makes one unusable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from realtide.bundle import BundleError, write_manifest
from realtide.engines.easycontrol.engine import load
from realtide.engines.easycontrol.types import Finish, ImageOptions
from tests.engines.easycontrol.small import EACH, WANTED, Small, alone, condition, images

CONDITIONS = (("sketch", "canny", 1), ("who", "subject", 2))


def play(engine: Any) -> Any:
    """Pixels of an image under two conditions."""
    from dataclasses import replace

    player = Small.__new__(Small)
    player.engine, player.store, player.stages = engine, engine.store, []
    session = engine.open(ImageOptions())
    for one in CONDITIONS:
        session.push(condition(*one))
    session.push(replace(WANTED, conditions=(("sketch", 1.0), ("who", 0.5)), preview_interval=2))
    session.push(Finish())
    made = images(player.play(session)[session])
    session.close()
    engine.close()
    return made[0].data


def test_graphs_give_the_same_image(image_bundle: Path) -> None:
    from dataclasses import replace

    want = alone(CONDITIONS, replace(WANTED, conditions=(("sketch", 1.0), ("who", 0.5))))
    assert np.asarray(want, int).std() > 1
    for backend in ("onnxruntime", "torch"):
        engine = load(image_bundle, slots=2, backend=backend)
        have = play(engine)
        np.testing.assert_allclose(np.asarray(have, int), np.asarray(want, int), atol=1)


def test_what_the_model_says_of_itself(image_bundle: Path) -> None:
    engine = load(image_bundle, slots=2, cache_bytes=5 * EACH)
    info = engine.info
    assert (info.size, info.multiple, info.side_range, info.max_pixels) == ((32, 32), 8, (16, 64), 4096)
    assert info.kinds == {"canny": "spatial", "depth": "spatial", "subject": "subject"}
    assert (info.steps, info.max_steps, info.guidance, info.guidance_range) == (4, 10, 3.5, (0.0, 10.0))
    assert (info.condition_bytes, info.cache_bytes, engine.cache_bytes) == (EACH, 5 * EACH, 5 * EACH)
    assert (info.precision, info.preview_scale, info.max_conditions) == ("fp32", 2, 2)
    assert info.count_tokens("a frog") > 1
    engine.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["architecture"].pop("vae"), "'vae'"),
        (lambda m: m["architecture"]["text"].update(dim=12), "must be transformer.text_dim"),
        (lambda m: m["architecture"]["pooled"].update(dim=8), "must be transformer.pooled_dim"),
        (lambda m: m["limits"].pop("size"), "'size'"),
        (lambda m: m["limits"].update(side=[16, 60]), "limits.side must be two multiples of 8"),
        (lambda m: m["limits"].update(side=[48, 64]), "limits.side"),
        (lambda m: m["limits"].update(pixels=1000), "limits.pixels must be at least 1024"),
        (lambda m: m["limits"].update(steps=3), r"limits.steps must be at least sampler.steps \(4\)"),
        (lambda m: m["limits"].update(weight=[2, 1]), "limits.weight must be two rising numbers"),
        (lambda m: m["architecture"]["conditions"].update(rank=4), "does not have the model's shapes"),
        (lambda m: m["architecture"]["conditions"].update(spatial=["pose"]), "the LoRA of pose lacks"),
    ],
)
def test_an_unusable_bundle_says_why(
    image_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image_bundle, copy)
    values = yaml.safe_load((copy / "manifest.yaml").read_text())
    for name in ("files", "format"):
        del values[name]
    change(values)
    write_manifest(copy, values)
    with pytest.raises(BundleError, match=problem):
        load(copy, slots=1)


def test_a_cache_too_small_for_an_image_is_refused(image_bundle: Path) -> None:
    with pytest.raises(BundleError, match=f"cache_bytes: 2 conditions of an image need {2 * EACH} bytes"):
        load(image_bundle, slots=1, cache_bytes=2 * EACH - 1)
