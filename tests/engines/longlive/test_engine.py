"""A bundle as the server loads it: graphs against modules, shared caches, errors that name the field."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from realtide.bundle import BundleError
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.session import VideoSession
from realtide.engines.longlive.types import Frames, SetPrompt, VideoOptions
from tests.engines.longlive.small import BLOCK

OPTIONS = VideoOptions("a dog runs", 24, 16, 16.0, seed=11, length=23, credit=23)


@pytest.fixture(scope="session")
def bundle(video_bundle: Path) -> Path:
    return video_bundle


def run(engine: LongLiveEngine, sessions: list[VideoSession]) -> list[list[np.ndarray]]:
    """Play sessions side by side to their ends; the frames of each."""
    frames: list[list[np.ndarray]] = [[] for _ in sessions]
    while not all(session.done for session in sessions):
        ready = [session for session in sessions if session.runnable()]
        if ready:
            engine.step([min(ready, key=lambda session: session.deadline())], lambda *_: None)
        else:
            time.sleep(0.001)
        for index, session in enumerate(sessions):
            for event in session.collect():
                if isinstance(event, Frames):
                    frames[index].append(np.frombuffer(event.data, np.uint8).astype(int))
    return frames


def levels_apart(wide: LongLiveEngine, narrow: LongLiveEngine) -> float:
    """Mean distance of the same short video by two engines, in levels of 255; closes both.

    The narrow one's caches must take half of the memory.
    """
    assert narrow.cache_bytes * 2 == wide.cache_bytes
    width, height = wide.info.sizes[0]
    options = VideoOptions("a yellow face", width, height, 16.0, seed=3, length=9, credit=9)
    frames = []
    for engine in (wide, narrow):
        session = engine.open(options)
        frames.append(np.stack(run(engine, [session])[0]))
        session.close()
        engine.close()
    return float(np.abs(frames[0] - frames[1]).mean())


def test_graphs_and_modules_make_the_same_video_also_with_one_cache_for_two(bundle: Path) -> None:
    results = []
    for backend, resident in (("torch", None), ("onnxruntime", None), ("onnxruntime", 1)):
        engine = load(bundle, slots=2, backend=backend, resident=resident)
        sessions = [engine.open(OPTIONS), engine.open(replace(OPTIONS, seed=12))]
        sessions[0].push(SetPrompt("c", "the sun sets", 7))
        results.append(run(engine, sessions))
        engine.close()
    eager, served, crowded = results
    for index in range(2):
        assert len(eager[index]) == 23
        assert max(np.abs(a - b).max() for a, b in zip(eager[index], served[index], strict=True)) <= 1
        # The first block is made before anybody is parked.
        np.testing.assert_array_equal(crowded[index][:3], served[index][:3])
        assert len(crowded[index]) == 23
    assert np.abs(served[0][20] - served[1][20]).max() > 1


def test_facts_come_from_the_manifest(bundle: Path) -> None:
    engine = load(bundle, slots=3, resident=2)
    info = engine.info
    assert (engine.name, engine.model, engine.slots, engine.max_batch) == ("longlive", "small-video", 3, 1)
    assert (info.backend, info.precision, info.version, info.license) == (
        "onnxruntime",
        "fp32",
        "1.0.0",
        "Apache-2.0",
    )
    assert (info.sizes, info.frames_per_second, info.frames_per_second_range) == (
        ((24, 16),),
        16.0,
        (1.0, 60.0),
    )
    assert (info.first_block, info.block, info.max_prompt_tokens) == (3, BLOCK, 16)
    assert info.count_tokens("a dog runs") > 1
    caches = engine._parts.caches._caches
    assert len(caches) == 2
    # Weights are loaded once.
    assert caches[0].programs.denoise._session is caches[1].programs.denoise._session  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"video": {"frames_per_second": 99}}}, "frames_per_second"),
        ({"architecture": {"stream": {"block": 0}}}, "stream.block must be"),
        ({"architecture": {"text": {"depth": 3}}}, "text has no field 'depth'"),
        ({"assets": {"tokenizer": "weights.safetensors"}}, "assets.tokenizer: not a SentencePiece model"),
        ({"programs": {"text": None}}, "programs.text"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named(
    bundle: Path, tmp_path: Path, change: dict[str, dict[str, object]], message: str
) -> None:
    copy = tmp_path / "small-video"
    shutil.copytree(bundle, copy)
    values = yaml.safe_load((copy / "manifest.yaml").read_text())
    for section, fields in change.items():
        for name, value in fields.items():
            if isinstance(value, dict):
                values[section][name] |= value
            elif value is None:
                del values[section][name]
            else:
                values[section][name] = value
    (copy / "manifest.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(BundleError, match=message):
        load(copy, slots=1)
