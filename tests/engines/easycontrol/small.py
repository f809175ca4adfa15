"""A whole small engine with random weights over the PyTorch modules."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realtide.engines.easycontrol import torch_programs
from realtide.engines.easycontrol.config import PooledConfig, TextConfig, condition_bytes, lora_shapes
from realtide.engines.easycontrol.engine import EasyControlEngine
from realtide.engines.easycontrol.parts import Parts
from realtide.engines.easycontrol.session import ImageSession
from realtide.engines.easycontrol.store import ConditionStore
from realtide.engines.easycontrol.text import ClipText, T5Encoder
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.easycontrol.types import (
    Condition,
    Finish,
    Generate,
    Image,
    ImageEvent,
    ImageModelInfo,
    ImageOptions,
)
from realtide.engines.easycontrol.vae import Projection, Vae
from realtide.engines.easycontrol.worker import Worker
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.torch_memory import TorchMemory
from tests.engines.easycontrol.conftest import CONFIG, MODEL, random, transformer

TOKENIZER = Path(__file__).parents[3] / "models" / "longlive-emoji" / "tokenizer.model"
TEXT = TextConfig(vocab=143, dim=10, head_dim=5, heads=2, ff_dim=16, layers=1, buckets=8, max_distance=8)
POOLED = PooledConfig(vocab=143, dim=6, heads=2, ff_dim=12, layers=1, tokens=24, start=-1, end=1)
LONG = replace(CONFIG, transformer=replace(MODEL, text_tokens=24))
EACH = condition_bytes(LONG)
KINDS = LONG.conditions.kinds
WANTED = Generate("one", "a red apple moves up", 32, 24, 3, 3.5, 7)


def info(budget: int) -> ImageModelInfo:
    """What the small model says of itself."""
    return ImageModelInfo(
        version="1.0.0", backend="torch", precision="fp32", device="cpu", license="Apache-2.0",
        size=(32, 32), multiple=8, side_range=(16, 64), max_pixels=64 * 64, steps=4, max_steps=10,
        guidance=3.5, guidance_range=(0.0, 10.0), kinds={k: LONG.conditions.role(k) for k in KINDS},
        condition_size=32, weight_range=(0.0, 2.0), max_conditions=2, condition_bytes=EACH,
        cache_bytes=budget, preview_scale=2, max_prompt_tokens=24, count_tokens=len,
    )  # fmt: skip


def modules() -> torch_programs.Modules:
    """The small model with random weights."""
    torch.manual_seed(4)
    made = torch_programs.Modules(
        transformer(LONG.transformer),
        Vae(LONG.vae).eval().requires_grad_(False),
        Projection(LONG.vae.latent, LONG.preview).eval().requires_grad_(False),
        T5Encoder(TEXT).eval().requires_grad_(False),
        ClipText(POOLED).eval().requires_grad_(False),
    )
    torch.nn.init.normal_(made.preview.weight)
    torch.nn.init.normal_(made.pooled.text_model["embeddings"]["token_embedding"].weight)  # type: ignore[index]
    return made


def adapters() -> dict[str, dict[str, Array]]:
    """A LoRA of each kind."""
    return {
        kind: {
            name: 0.3 * random(number * 100 + index, *shape)
            for index, (name, shape) in enumerate(lora_shapes(LONG.transformer, 3).items())
        }
        for number, kind in enumerate(LONG.conditions.kinds)
    }


class Small:
    """An engine over PyTorch modules.

    Args:
        slots: sessions.
        conditions: that fit into the cache.
    """

    def __init__(self, slots: int = 4, conditions: int = 8) -> None:
        made = modules()
        programs = torch_programs.image_programs(made, LONG)
        pieces = PromptTokenizer(TOKENIZER, 24)
        loras = adapters()
        store = ConditionStore(conditions * EACH + 17, EACH)
        worker = Worker("small", TorchMemory())
        parts = Parts(LONG, programs, pieces, PooledTokenizer(POOLED, pieces), loras, store, worker)
        self.engine = EasyControlEngine("small", info(store.budget), parts, slots, slots)
        self.store = store
        self.stages: list[tuple[str, int]] = []
        self.woken: list[object] = []
        self.engine.attach(self.woken.append, self.on_stage)

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """Note the stage."""
        self.stages.append((stage, batch))

    def open(self, *conditions: tuple[str, str, int], **options: Any) -> ImageSession:
        """A session with conditions (id, kind, seed of its pixels)."""
        session = self.engine.open(ImageOptions(**options))
        for name, kind, seed in conditions:
            session.push(condition(name, kind, seed))
        return session

    def play(
        self, *sessions: ImageSession, until: Callable[[], bool] = lambda: False
    ) -> dict[ImageSession, list[ImageEvent]]:
        """Steps until all sessions are done, batching what can be batched; events by session."""
        events: dict[ImageSession, list[ImageEvent]] = {session: [] for session in sessions}
        while not until():
            for session in sessions:
                events[session] += session.collect()
            if all(session.done or session.current is None for session in sessions) and all(
                session._outbox.idle for session in sessions
            ):
                break
            ready = [session for session in sessions if session.runnable()]
            if not ready:
                time.sleep(0.001)
                continue
            key = self.engine.batch_key(min(ready, key=lambda session: session.deadline()))
            batch = [session for session in ready if self.engine.batch_key(session) == key]
            for session, found in zip(batch, self.engine.step(batch, self.on_stage), strict=True):
                events[session] += found
            assert self.store.nbytes <= self.store.budget
        return events


def condition(name: str, kind: str, seed: int, side: int = 32) -> Condition:
    """A condition image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Condition(name, kind, pixels)


def images(events: list[ImageEvent]) -> list[Image]:
    """The images among events."""
    return [event for event in events if isinstance(event, Image)]


def alone(
    conditions: tuple[tuple[str, str, int], ...], wanted: Generate, small: Small | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels that a request gives in an engine of its own."""
    small = small or Small()
    session = small.open(*conditions)
    session.push(wanted)
    session.push(Finish())
    made = images(small.play(session)[session])
    session.close()
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = made[0].data
    return pixels
