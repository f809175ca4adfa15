"""A small speech bundle with random weights, real recordings, and the arguments tests share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.export import write_bundle
from realtide.engines.ancat.frontend import Float32, Frontend, offline_features
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.offline import encode, hard_arcs, windows_of
from tests.engines.ancat.oracle import small_config, wild

DATA = Path(__file__).parents[2] / "data"
CLIPS = (
    "digit-three",
    "digit-seven",
    "wake-smart-mirror",
    "wake-alexa",
    "librispeech-begin",
    "prompt-password",
    "coffee-mocha",
)


@dataclass(frozen=True)
class Clip:
    """A real recording and its un-normalised log-mel features [frames, mel]."""

    name: str
    samples: Float32
    rate: int
    features: Float32


@dataclass(frozen=True)
class SmallBundle:
    """A bundle on disk and what it was made of; `model` has the weights as they are stored."""

    path: Path
    config: EncoderConfig
    model: Transducer
    mean: Float32
    std: Float32

    def windows(self, clip: Clip) -> torch.Tensor:
        """Normalised windows [T, 7, mel] of a whole recording."""
        front = Frontend(clip.rate, mean=self.mean, std=self.std)
        front.push(clip.samples)
        front.finish()
        return torch.from_numpy(front.take())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores only spin against each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips() -> dict[str, Clip]:
    """The recordings that tests stream, by name."""
    found = {}
    for name in CLIPS:
        samples, rate = soundfile.read(DATA / "audio" / f"{name}.flac", dtype="float32")
        found[name] = Clip(name, samples, rate, offline_features(samples, rate))
    return found


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Clip]) -> SmallBundle:
    """Exported once: random weights whose schedulers ask for every depth and whose search emits tokens."""
    path = tmp_path_factory.mktemp("bundles") / "small"
    config = small_config(vocab=257, right=3)
    torch.manual_seed(1)
    model = wild(config, seed=8)
    features = np.concatenate([clip.features for clip in clips.values()])
    mean, std = features.mean(0), features.std(0)
    windows = windows_of(torch.from_numpy((features - mean) / std)[None], config)
    with torch.no_grad():
        torch.nn.init.normal_(model.joiner.out.weight, std=1.5)
        out = encode(model.encoder, windows, torch.tensor([windows.shape[1]]), hard_arcs(config))
        logits = model.joiner(out.rows, model.predictor(torch.zeros(1, 2, dtype=torch.long)))
        # Blank wins some of the frames, so that there are words and silences.
        model.joiner.out.bias[0] += (logits[..., 1:].amax(-1) - logits[..., 0]).quantile(0.4)
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(half)
    logging.disable(logging.WARNING)  # the exporter's traces take longer to capture than to make
    write_bundle(
        path,
        config,
        {name: value.numpy() for name, value in half.items()},
        mean,
        std,
        DATA / "tokenizer.model",
        {
            "name": "small",
            "version": "1.0.0",
            "description": "Random weights, for tests.",
            "licence": "Apache-2.0",
            "limits": {"max_utterance_ms": 30_000},
            "provenance": {"recipe": "tests/engines/ancat/conftest.py", "created": "2026-11-23"},
        },
        word_times={},
    )
    logging.disable(logging.NOTSET)
    return SmallBundle(path, config, model, mean, std)
