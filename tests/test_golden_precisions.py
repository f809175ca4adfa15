"""Golden cases replayed for a quality report: which ones, how far off, and what fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from realtide.engines.runtime.golden import NARROW, CaseError
from realtide.golden_precisions import cases, exceeded, replayed

GOLDEN = Path(__file__).parent / "golden"


def test_each_engine_has_its_own_cases(tmp_path: Path) -> None:
    images = [path.stem for path in cases("easycontrol", GOLDEN)]
    assert images == ["spatial_one", "subject_and_spatial", "subject_one"]  # no LoRA, no weights, no encoder
    assert [path.stem for path in cases("longlive", GOLDEN / "longlive")] == [
        *("relative_rope_static", "switch_global_sink", "switch_recached_sink"),
        *("umt5_seed41", "wan_vae_seed31"),
    ]
    with pytest.raises(
        CaseError, match=r"^goldens: must be a directory with golden cases of longlive, .* has"
    ):
        cases("longlive", tmp_path)


def test_a_case_is_replayed_in_the_precision(tmp_path: Path) -> None:
    for path in (GOLDEN / "longlive").glob("umt5_*"):
        shutil.copy(path, tmp_path)
    told: list[tuple[str, int, int]] = []
    found = replayed("longlive", "bfloat16", tmp_path, lambda *what: told.append(what))
    assert told == [("umt5_seed41", 0, 1)]
    assert isinstance(found, dict)
    case = found["umt5_seed41"]
    assert 1e-3 < case["worst"] <= case["bound"] == NARROW["bfloat16"]
    assert case["rel_l2"] == {"embeds_padding_zeroed": case["worst"]}


def test_what_has_no_cases_says_so() -> None:
    assert str(replayed("ancat", "float16", GOLDEN)).startswith("there are no golden cases of ancat")


def test_cases_above_their_bound_are_named() -> None:
    golden = {
        name: {"worst": worst, "bound": 0.01}
        for name, worst in {"at": 0.01, "above": 0.011, "nan": float("nan")}.items()
    }
    assert exceeded({**golden, "commit": "abc"}) == ["above", "nan"]
    assert exceeded("not measured") == exceeded(None) == []
