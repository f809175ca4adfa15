"""What the bundles below models/ do for quality reports: which programs it calls, on what, and when not."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from realtide import recorded_work
from realtide.bundle import BundleError, load_bundle
from realtide.engines.ancat.search import START
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.recorded_work import RECORDINGS, recorded

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
NEVER_CALLED = {"longlive-emoji": {"encode_first", "encode_next"}}


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/manifest.yaml")))
def test_every_program_that_serves_is_called_on_what_its_graph_takes(name: str) -> None:
    bundle = load_bundle(MODELS / name)
    samples, told = recorded(bundle)
    assert set(samples) == set(bundle.manifest.programs) - NEVER_CALLED.get(name, set())
    assert not told.startswith("not run")
    for found in samples.values():
        assert all(len(sample.calls) == 1 for sample in found)
        assert all(np.isfinite(a).all() for s in found for a in s.calls[0].values() if a.dtype.kind == "f")


def test_a_videos_calls_are_its_own() -> None:
    samples, told = recorded(load_bundle(MODELS / "longlive-emoji"))
    assert told == "a video of 18 latent frames, with another prompt for the last 3"
    first, *later = samples["denoise"]
    assert not any(array.any() for array in first.state.values())  # nothing is cached before the first block
    assert all(sample.state["key_0"].any() for sample in later[2:])
    one, two = (sample.calls[0]["ids"] for sample in samples["text"])
    assert one.tolist() != two.tolist()


def test_speech_is_transcribed_by_both_forms_of_the_encoder() -> None:
    bundle = load_bundle(MODELS / "ancat-commands-en")
    samples, told = recorded(bundle)
    assert told == "8 recordings, up to 10 s of each, transcribed together"
    assert len(samples["encoder"][0].calls[0]["slots"]) == 8
    # The joiner's contexts are what was understood: late ones are words, not the start of an utterance.
    tokens = np.concatenate([sample.calls[0]["contexts"].ravel() for sample in samples["joiner"]])
    understood = {int(token) for token in tokens} - set(START)
    tokenizer = Tokenizer(bundle.asset("tokenizer"))
    clips = csv.DictReader((RECORDINGS / "clips.tsv").read_text("utf-8").splitlines(), delimiter="\t")
    said = {token for clip in clips for token in tokenizer.encode(clip["text"])}
    assert len(understood & said) >= 5
    assert len(understood & said) > 0.6 * len(understood)
    assert any(sample.calls[0]["fresh"].any() for sample in samples["encoder_static"])
    assert any(sample.calls[0]["final"].any() for sample in samples["encoder_static"])


def test_what_is_not_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(MODELS / "ancat-commands-en")
    size = bundle.weights.stat().st_size
    told = f"not run: the weights have {size} bytes, more than {size - 1}"
    assert recorded(bundle, most_bytes=size - 1) == ({}, told)
    monkeypatch.setattr(recorded_work, "RECORDINGS", tmp_path / "none")
    assert recorded(bundle) == ({}, "not run: no recordings were given")
    copy = tmp_path / "video"
    shutil.copytree(MODELS / "longlive-emoji", copy, ignore=shutil.ignore_patterns("recipe"))
    text = (copy / "manifest.yaml").read_text("utf-8")
    (copy / "manifest.yaml").write_text(
        text.replace("assets:\n  tokenizer: tokenizer.model\n", "", 1), "utf-8"
    )
    samples, told = recorded(load_bundle(copy))
    assert (samples, told) == ({}, "not run: longlive-emoji: assets.tokenizer is missing")


def test_recordings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bundle = load_bundle(MODELS / "ancat-commands-en")
    with pytest.raises(BundleError, match=r"^recordings: must be a directory with .* files, not "):
        recorded(bundle, tmp_path)
    (tmp_path / "noise.wav").write_bytes(b"RIFF")
    with pytest.raises(BundleError, match=r"^recordings: .*noise\.wav: "):
        recorded(bundle, tmp_path)
