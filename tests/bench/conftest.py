"""A tiny speech bundle with random weights, made once, and pools of utterances in the recipe's format."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from realtide.engines.ancat.export import write_bundle
from realtide.engines.ancat.frontend import Float32, offline_features
from realtide.engines.ancat.model import Transducer
from tests.cli.conftest import run as run
from tests.engines.ancat.oracle import small_config, wild

DATA = Path(__file__).parents[1] / "data"
AUDIO, TOKENIZER = DATA / "audio", DATA / "tokenizer.model"
TEXTS = {
    "digit-three": "three",
    "digit-seven": "seven",
    "wake-alexa": "alexa",
    "librispeech-begin": "let me see how can i begin",
}


@dataclass(frozen=True)
class Tiny:
    """A bundle and what it was made of; `checkpoint` has the same weights as the recipe saves them."""

    path: Path
    checkpoint: Path
    cmvn: Path
    tokenizer: Path
    model: Transducer
    mean: Float32
    std: Float32


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores only spin against each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Exported once."""
    folder = tmp_path_factory.mktemp("tiny")
    model = wild(small_config(vocab=257, right=3, layers=2), seed=3)
    with torch.no_grad():
        model.joiner.out.weight.mul_(6.0)
        model.joiner.out.bias[0] = 5.0  # blank wins most frames, so that there are words and silences
    features = np.concatenate([_features(name) for name in TEXTS])
    mean, std = features.mean(0), features.std(0)
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(half)
    about = {
        "name": "tiny",
        "version": "0.0.1",
        "description": "Random weights, for tests.",
        "licence": "Apache-2.0",
        "provenance": {"recipe": "tests/bench/conftest.py", "created": "2026-11-23"},
    }
    weights = {name: value.numpy() for name, value in half.items()}
    logging.disable(logging.WARNING)  # the exporter's traces take longer to capture than to make
    write_bundle(folder / "bundle", model.config, weights, mean, std, TOKENIZER, about)
    logging.disable(logging.NOTSET)
    torch.save({"weights": model.state_dict(), "config": model.config.to_dict()}, folder / "final.pt")
    np.save(folder / "cmvn.npy", np.stack([mean, std]))
    return Tiny(folder / "bundle", folder / "final.pt", folder / "cmvn.npy", TOKENIZER, model, mean, std)


def _features(name: str) -> Float32:
    samples, rate = soundfile.read(AUDIO / f"{name}.flac", dtype="float32")
    return offline_features(samples, rate)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recordings of TEXTS as a pool; one of them has word times, and one more is not sure of its text."""
    folder = tmp_path_factory.mktemp("pools") / "clips"
    folder.mkdir()
    rows, blocks, offset = [], [], 0
    for name, text in [*TEXTS.items(), ("wake-smart-mirror", "something else")]:
        features = _features(name).astype(np.float16)
        rows.append(
            {
                "name": name,
                "offset": offset,
                "frames": len(features),
                "text": text,
                "words": [["three", 0.05, 0.45]] if name == "digit-three" else [],
                "sure": name != "wake-smart-mirror",
            }
        )
        blocks.append(features)
        offset += len(features)
    np.save(folder / "features.npy", np.concatenate(blocks))
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
