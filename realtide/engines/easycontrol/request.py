"""One image while it forms: what it needs before its steps, and where its steps are (ours). Numpy only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from realtide.engines.easycontrol import schedule
from realtide.engines.easycontrol.parts import Parts, Prompt, Row, digest
from realtide.engines.easycontrol.store import Handle, Key
from realtide.engines.easycontrol.types import Conditioned, Generate, Pixels8
from realtide.engines.engine import StageTimer
from realtide.engines.runtime.noise import normal

Float32 = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Held:
    """A condition image that a session was given; its latents are computed when first needed."""

    kind: str
    pixels: Pixels8 = field(repr=False)
    digest: bytes = b""
    latents: Float32 | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.digest = digest(self.pixels)


class Request:
    """An image of one session.

    Args:
        parts: of the engine.
        wanted: what was asked for.
        position: of the image.
        conditions: its condition images with their weights.
    """

    def __init__(
        self, parts: Parts, wanted: Generate, position: int, conditions: Sequence[tuple[Held, float]]
    ) -> None:
        self._parts = parts
        self.wanted, self.position = wanted, position
        self.conditions = tuple(conditions)
        self.grid = parts.config.grid(wanted.width, wanted.height)
        tokens = self.grid[0] * self.grid[1]
        self._sigmas = schedule.sigmas(parts.config.sampler, wanted.steps, tokens)
        self.step = 0
        self.begun = False
        self.latents: Float32 | None = None
        self._prompt: Prompt | None = None
        self._handle: Handle | None = None
        self._told = False
        self._started = 0.0

    @property
    def ready(self) -> bool:
        """True if nothing but steps is left."""
        return self._prompt is not None and self._handle is not None and self._handle.wanted() is None

    @property
    def done(self) -> bool:
        """True if all steps are done."""
        return self.step == self.wanted.steps

    @property
    def condition_tokens(self) -> int:
        """Cached tokens that its steps attend to."""
        return len(self.conditions) * self._parts.config.condition_tokens

    @property
    def sigma(self) -> float:
        """Noise level at present."""
        return float(self._sigmas[self.step])

    @property
    def waits(self) -> bool:
        """True if other requests hold the memory that its conditions need."""
        return self._prompt is not None and self._handle is None and self._hold() is None

    def prepare(self, on_stage: StageTimer) -> Conditioned | None:
        """Do one thing before the steps: embed the prompt, or compute one condition.

        Returns:
            What was found, once it is ready.
        """
        parts = self._parts
        if not self._started:
            self._started = time.monotonic()
        if self._prompt is None:
            known = parts.known(self.wanted.prompt)
            begun = time.perf_counter()
            self._prompt = parts.prompt(self.wanted.prompt)
            if not known:
                on_stage("text", time.perf_counter() - begun, 1)
        elif (handle := self._hold()) is not None and (key := handle.wanted()) is not None:
            index = handle.keys.index(key)
            held, _ = self.conditions[index]
            if held.latents is None:
                begun = time.perf_counter()
                held.latents = parts.encode(held.pixels)
                on_stage("vae", time.perf_counter() - begun, 1)
            begun = time.perf_counter()
            parts.remember(key, held.latents, self._prompt, self.grid)
            on_stage("condition", time.perf_counter() - begun, 1)
        if not self.ready:
            # Without conditions there is nothing to wait for.
            self._hold()
        if self.ready and not self._told and self._handle is not None:
            self._told = True
            misses = len(self._handle.missing)
            hits = len(dict.fromkeys(self._handle.keys)) - misses
            return Conditioned(self.position, hits, misses, time.monotonic() - self._started)
        return None

    def row(self) -> Row:
        """Its part of the next step."""
        if self._prompt is None or self._handle is None:
            raise ValueError("the request is not ready")
        if self.latents is None:
            shape = self.grid[0] * self.grid[1], self._parts.config.transformer.channels
            self.latents = normal(self.wanted.seed, 0, 0, shape)
        return Row(self.latents, self.sigma, self.wanted.guidance, self._prompt, self._handle.tensors())

    def advance(self, velocity: Float32) -> Float32:
        """Take a step; returns the clean latents that the prediction amounts to."""
        if self.latents is None:
            raise ValueError("the request has no latents")
        sigma, following = self.sigma, float(self._sigmas[self.step + 1])
        clean = schedule.clean(self.latents, velocity, sigma)
        self.latents = schedule.step(self.latents, velocity, sigma, following)
        self.step += 1
        return clean

    def close(self) -> None:
        """Let go of the conditions. Any number of times."""
        if self._handle is not None:
            self._handle.release()
            self._handle = None
        self._parts.forget_joined()

    def _hold(self) -> Handle | None:
        if self._handle is None and self._prompt is not None:
            self._handle = self._parts.store.reserve(self._keys(self._prompt))
        return self._handle

    def _keys(self, prompt: Prompt) -> list[Key]:
        config = self._parts.config
        guidance = self.wanted.guidance if config.transformer.guidance else None
        return [
            Key(
                held.digest,
                held.kind,
                weight,
                prompt.digest,
                guidance,
                self.grid if config.conditions.role(held.kind) == "spatial" else None,
            )
            for held, weight in self.conditions
        ]


def state_of(request: Request) -> tuple[dict[str, object], Mapping[str, NDArray[np.generic]]]:
    """A request that is begun as plain values and tensors, for a checkpoint."""
    wanted = request.wanted
    plain: dict[str, object] = {
        "prompt": wanted.prompt,
        "width": wanted.width,
        "height": wanted.height,
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "seed": wanted.seed,
        "preview_interval": wanted.preview_interval,
        "control_id": wanted.control_id,
        "step": request.step,
        "position": request.position,
        "conditions": [[held.kind, weight] for held, weight in request.conditions],
    }
    tensors: dict[str, NDArray[np.generic]] = {
        f"condition.{n}": held.pixels for n, (held, _) in enumerate(request.conditions)
    }
    if request.latents is not None:
        tensors["latents"] = request.latents
    return plain, tensors
