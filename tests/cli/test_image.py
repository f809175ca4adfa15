"""`realtide image`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Run


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    """A condition image."""
    path = tmp_path / "sketch.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


def test_images_from_conditions(run: Run, image_bundle: Path, sketch: Path, tmp_path: Path) -> None:
    done = run(
        "image", "--prompt", "a frog", "--condition", f"canny={sketch}:0.8",
        "--condition", f"subject={sketch}",
        "--size", "32x24", "--steps", "3", "--seed", "5", "--count", "2", "--preview-interval", "1",
        "--out", tmp_path / "frog.png", "--bundle", image_bundle, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    told = [json.loads(line) for line in done.out.splitlines()]
    # The second image may begin before the first one is done.
    kinds = [one["type"] for one in told if one["type"] != "preview"]
    assert kinds[:2] == ["opened", "conditions"]
    assert kinds[-1] == "image"
    assert sorted(kinds[2:-1]) == ["conditions", "image"]
    assert [(one["hits"], one["misses"]) for one in told if one["type"] == "conditions"] == [(0, 2), (2, 0)]
    images = [one for one in told if one["type"] == "image"]
    assert [(one["seed"], one["width"], one["height"]) for one in images] == [(5, 32, 24), (6, 32, 24)]
    assert [Path(one["path"]).name for one in images] == ["frog-1.png", "frog-2.png"]
    first, second = (Image.open(one["path"]) for one in images)
    assert first.size == (32, 24)
    assert first.tobytes() != second.tobytes()
    assert sum(one["type"] == "preview" for one in told) == 4
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_made_is_said_before_anything_is_started(
    run: Run, sketch: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.png"
    ways: list[tuple[list[object], str]] = [
        (["--out", tmp_path / "a.gif"], "must end in .png, .jpg, .jpeg, .rgb"),
        (["--out", tmp_path / "no" / "a.png"], "there is no directory"),
        (["--out", out, "--size", "32"], "must be WxH"),
        (["--out", out, "--condition", "canny"], "must be KIND=PATH"),
        (["--out", out, "--condition", f"canny={sketch}.x"], "there is no file"),
        (["--out", out, "--condition", f"canny={sketch}:heavy"], "'heavy' is no weight"),
        (["--out", out, "--quality", "50"], "--quality is for JPEG"),
        (["--out", out, "--bundle", "x", "--server", "localhost:1"], "--bundle is for the own server"),
        (["--out", out, "--seed", str(2**64 - 1), "--count", "2"], "must be at most"),
    ]
    for arguments, problem in ways:
        done = run("image", "--prompt", "a frog", *arguments)
        assert done.code == 2, arguments
        assert problem in done.err


def test_a_kind_that_the_model_has_not_is_named(
    run: Run, image_bundle: Path, sketch: Path, tmp_path: Path
) -> None:
    done = run(
        "image", "-p", "a frog", "--condition", f"pose={sketch}", "--out", tmp_path / "a.jpg",
        "--bundle", image_bundle,
    )  # fmt: skip
    assert done.code == 2
    assert "kinds of small-images: canny, depth, subject" in done.err


def test_a_preview_is_a_picture_of_its_own_size(run: Run, image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jpg"
    done = run("image", "-p", "a frog", "--preview", "--out", out, "--bundle", image_bundle)
    assert (done.code, done.out) == (0, "")
    assert Image.open(io.BytesIO(out.read_bytes())).size == (32, 32)


def test_the_demo_draws_from_a_sketch(run: Run, image_bundle: Path, tmp_path: Path) -> None:
    done = run("demo", "--bundle", image_bundle, "--out", tmp_path / "made")
    assert done.code == 0, done.err
    assert "Drawing two images from one sketch (canny)" in done.out
    assert "first preview, after the images were asked for" in done.out
    assert "images made                                                2" in done.out
    with Image.open(tmp_path / "made" / "images.png") as sheet:
        assert sheet.size == (3 * 128, 128)
