"""`realtide bench image`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.cli.conftest import run as run  # the fixture


def test_rates_and_delays(run: Run, image_bundle: Path, tmp_path: Path) -> None:
    done = run(
        "bench", "image", "--bundle", image_bundle, "--images", "4", "--streams", "2", "--steps", "3",
        "--prompt", "a frog", "--json", "--out", tmp_path / "image.json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert json.loads((tmp_path / "image.json").read_text()) == result
    assert (result["model"], result["width"], result["steps"]) == ("small-images", 32, 3)
    plain, guided = result["parts"]
    assert (plain["streams"], plain["conditions"], plain["hits"], plain["misses"]) == (2, 0, 0, 0)
    # Each of the two streams has a picture of its own, which is computed once.
    assert (guided["conditions"], guided["hits"], guided["misses"]) == (1, 6, 2)
    for part in result["parts"]:
        assert part["images_per_second"] > 0
        assert 0 < part["first_preview_seconds"]["p50"] <= part["image_seconds"]["p50"]
    assert guided["ready_seconds"]["computed"]["p50"] > 0


def test_a_kind_that_there_is_not(run: Run, image_bundle: Path) -> None:
    done = run("bench", "image", "--bundle", image_bundle, "--kind", "pose")
    assert done.code == 2
    assert "kinds of small-images: canny, depth, subject" in done.err
    assert run("bench", "image", "--bundle", "x", "--server", "localhost:1").code == 2
