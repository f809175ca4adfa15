"""Images of a bundle through its serving engine: what scores and sheets are made with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pictures import Float32

from realtide.engines.easycontrol.engine import load
from realtide.engines.easycontrol.types import (
    Condition,
    Conditioned,
    Finish,
    Generate,
    Image,
    ImageOptions,
)

Pixels8 = NDArray[np.uint8]


def bytes_of(pixels: Float32) -> Pixels8:
    """Pixels [3, h, w] in -1 .. 1 as [h, w, 3]."""
    return np.clip(np.rint(pixels.transpose(1, 2, 0) * 127.5 + 127.5), 0, 255).astype(np.uint8)


def planes_of(pixels: Pixels8) -> Float32:
    """The inverse of `bytes_of`."""
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1


class Artist:
    """A bundle that is asked for one image at a time.

    Args:
        bundle: its directory.
        steps: of every image; None: as the bundle has it.
        precision: of the graphs; None: the bundle's first.
    """

    def __init__(self, bundle: Path, steps: int | None = None, precision: str | None = None) -> None:
        self._engine = load(bundle, slots=1, max_batch=1, precision=precision)
        self.steps = steps or self._engine.info.steps
        self.seconds: list[float] = []
        """Of each image, decoding included."""
        self.conditioning: list[float] = []
        """Of what comes before the steps."""

    def draw(
        self,
        prompt: str,
        size: tuple[int, int],
        seed: int,
        conditions: Sequence[tuple[str, Float32, float]] = (),
    ) -> Float32:
        """Pixels [3, h, w] in -1 .. 1 for conditions (kind, pixels, weight)."""
        begun = time.perf_counter()
        session = self._engine.open(ImageOptions())
        try:
            named = []
            # Subjects first, as the release orders them.
            for number, (kind, pixels, weight) in enumerate(
                sorted(conditions, key=lambda c: c[0] != "subject")
            ):
                session.push(Condition(str(number), kind, bytes_of(pixels)))
                named.append((str(number), weight))
            session.push(Generate("one", prompt, *size, self.steps, 0.0, seed, tuple(named)))
            session.push(Finish())
            made: Image | None = None
            while made is None:
                events = list(session.collect())
                if session.runnable():
                    events += self._engine.step([session], lambda stage, seconds, batch: None)[0]
                elif not events:
                    time.sleep(0.0005)
                for event in events:
                    if isinstance(event, Conditioned):
                        self.conditioning.append(event.seconds)
                    if isinstance(event, Image):
                        made = event
        finally:
            session.close()
        self.seconds.append(time.perf_counter() - begun)
        return planes_of(made.data)

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()
