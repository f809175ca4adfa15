"""A whole small engine with random weights: transformer, decoder and a stand-in for the text encoder."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from realtide.engines.longlive.caches import Cache
from realtide.engines.longlive.config import VaeConfig, VideoConfig, decoder_shapes, session_bytes
from realtide.engines.longlive.engine import LongLiveEngine
from realtide.engines.longlive.session import VideoSession
from realtide.engines.longlive.torch_programs import decoder_programs
from realtide.engines.longlive.types import Credit, Frames, VideoEvent, VideoModelInfo, VideoOptions
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.torch_memory import TorchMemory
from tests.engines.longlive.conftest import Player, video_config

VAE = VaeConfig(
    dim=4, latent=4, multipliers=(1, 2, 2), residual_blocks=1, temporal=(False, True),
    mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.5, 1.0, 1.0),
)  # fmt: skip
BLOCK = 4  # video frames of a block of 2 latent frames; the first block has 3
OPTIONS = VideoOptions("one", 24, 16, 16.0, seed=5)


class Small:
    """An engine over PyTorch modules."""

    def __init__(self, slots: int = 4, caches: int | None = None, **stream: Any) -> None:
        self.player = Player(video_config(**({"rotary": "relative"} | stream)))
        self.config: VideoConfig = self.player.config
        torch.manual_seed(3)
        decoder = WanVae(VAE).eval().requires_grad_(False)
        shapes = decoder_shapes(VAE, self.config.stream.height, self.config.stream.width)
        made = []
        for _ in range(caches or slots):
            programs, arrays = self.player.bound()
            keys = {name: torch.from_numpy(array) for name, array in arrays.items()}
            features = {name: torch.full(shape, 9.0) for name, shape in shapes.items()}
            half = decoder_programs(decoder, features, self.config.stream.height, self.config.stream.width)
            made.append(Cache(programs, keys, half, features))
        info = VideoModelInfo(
            "1.0.0", "torch", "fp32", "cpu", "Apache-2.0", ((24, 16),), 16.0, (1.0, 60.0), 3, BLOCK, 5, len,
            session_bytes(self.config, VAE),
        )  # fmt: skip
        self.embedded: list[str] = []
        memory = TorchMemory()
        self.engine = LongLiveEngine("small", info, self.config, VAE, self.embed, made, slots, memory)
        self.stages: list[str] = []
        self.engine.attach(lambda session: None, self.on_stage)

    def embed(self, prompt: str) -> Array:
        """Other embeddings for each prompt."""
        self.embedded.append(prompt)
        return self.player.text(zlib.crc32(prompt.encode()))

    def open(self, **changes: Any) -> VideoSession:
        """A session with a credit that never binds, unless `credit` is given."""
        return self.engine.open(replace(OPTIONS, **({"credit": 10**6} | changes)))

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """Note the stage."""
        self.stages.append(stage)

    def step(self, session: VideoSession) -> list[VideoEvent]:
        """One step."""
        return self.engine.step([session], self.on_stage)[0]

    def play(self, session: VideoSession, until: Callable[[], bool] | None = None) -> list[VideoEvent]:
        """Steps until `until`, or until nothing more comes; all events."""
        events: list[VideoEvent] = []
        while not (until and until()):
            events += session.collect()
            if session.done or (until and until()):
                break
            if session.runnable():
                events += self.step(session)
            elif session._decoding.idle:
                events += session.collect()
                if not session.runnable() and session._decoding.idle:
                    break
            else:
                time.sleep(0.001)
        return events


def frames_of(events: list[VideoEvent]) -> dict[int, bytes]:
    """Frame index to its pixels; every frame once, in order, without gaps."""
    found = [event for event in events if isinstance(event, Frames)]
    for before, after in itertools.pairwise(found):
        assert after.first == before.first + before.count
    assert all(event.count == 1 for event in found)
    return {event.first: event.data for event in found}


def credit(position: int) -> Credit:
    """A credit that came now."""
    return Credit(position, time.monotonic())
