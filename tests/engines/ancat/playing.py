"""Playing recordings to an engine: chunk sizes, sessions that come and go, and what the encoder gave them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from realtide.engines.ancat.engine import AncatEngine, load
from realtide.engines.ancat.frontend import Float32
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.types import Applied, Audio, Final, Finish, SpeechEvent, SpeechInput

CHUNKS: dict[str, Callable[[int, random.Random], int]] = {
    "10 ms": lambda rate, _: rate // 100,
    "37 ms": lambda rate, _: rate * 37 // 1000,
    "random": lambda rate, rng: rng.randint(0, rate // 4),
    "all at once": lambda rate, _: 1 << 30,
}


def ignore(stage: str, seconds: float, batch: int) -> None:
    """A stage timer."""


@dataclass
class Heard:
    """All that one session gave."""

    events: list[SpeechEvent] = field(default_factory=list)
    rows: list[Float32] = field(default_factory=list)
    available: list[int] = field(default_factory=list)

    @property
    def finals(self) -> list[Final]:
        return [event for event in self.events if isinstance(event, Final)]

    @property
    def applied(self) -> list[Applied]:
        return [event for event in self.events if isinstance(event, Applied)]

    @property
    def encoded(self) -> Float32:
        """Encoder rows [T, J]."""
        return np.concatenate(self.rows)

    def words(self) -> list[list[tuple[Any, ...]]]:
        """Per final its reason and its words, without confidences, which depend on rounding."""
        return [[(f.reason, f.text), *((w.text, w.start, w.end) for w in f.words)] for f in self.finals]


class Room:
    """An engine whose sessions are listened to."""

    def __init__(self, bundle: Path, backend: str = "onnxruntime", slots: int = 6, **more: Any) -> None:
        self.engine: AncatEngine = load(bundle, slots=slots, max_batch=slots, backend=backend, **more)
        self.heard: dict[SpeechSession, Heard] = {}  # by the object: ids of closed sessions come again
        self.sizes: list[int] = []
        encode = self.engine._encode

        def listening(sessions: Sequence[SpeechSession], works: Any, windows: Any) -> Any:
            encoded, available, counts = encode(sessions, works, windows)
            at = 0
            for session, n in zip(sessions, counts, strict=True):
                heard = self.heard.setdefault(session, Heard())
                heard.rows.append(encoded[at : at + n])
                heard.available += available[at : at + n].tolist()
                at += n
            self.sizes.append(len(sessions))
            return encoded, available, counts

        setattr(self.engine, "_encode", listening)  # noqa: B010

    def of(self, session: SpeechSession) -> Heard:
        return self.heard.setdefault(session, Heard())

    def push(self, session: SpeechSession, item: SpeechInput) -> None:
        self.of(session).events.extend(session.push(item))

    def step(self, *sessions: SpeechSession) -> None:
        """One step of those that are runnable."""
        ready = [s for s in sessions if s.runnable()]
        if ready:
            for session, events in zip(ready, self.engine.step(ready, ignore), strict=True):
                self.of(session).events.extend(events)

    def drain(self, *sessions: SpeechSession) -> None:
        """Steps until nothing is runnable."""
        while any(s.runnable() for s in sessions):
            self.step(*sessions)

    def play(self, session: SpeechSession, inputs: Sequence[SpeechInput], *, lazy: bool = False) -> Heard:
        """Push inputs, with steps after each of them, or all steps at the end."""
        for item in inputs:
            self.push(session, item)
            if not lazy:
                self.drain(session)
        self.drain(session)
        return self.of(session)


def pieces(samples: Float32, rate: int, chunk: str, seed: int = 0) -> Iterator[Audio]:
    """Audio in chunks."""
    rng, at = random.Random(seed), 0
    while at < len(samples):
        n = CHUNKS[chunk](rate, rng)
        yield Audio(samples[at : at + n], 0.0)
        at += n


def whole(samples: Float32, rate: int, chunk: str, seed: int = 0) -> list[SpeechInput]:
    """Audio in chunks, and the end."""
    return [*pieces(samples, rate, chunk, seed), Finish()]
