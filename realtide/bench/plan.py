"""What a load is: so many streams, when each sends which chunk, and when it is measured (ours).

Chunk k of a stream holds the samples that are spoken until ``start + phase + (k + 1) * chunk`` on the
monotonic clock; that is when it is *due* and is sent. Phases are uniform within a chunk, drawn from a seed,
so that streams neither march in step nor are spread more evenly than real ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Plan:
    """A load, as the processes that make it are told it.

    Attributes:
        streams: Streams at the same time.
        seconds: Length of the measured window.
        warmup: Seconds before it, with all streams running.
        chunk_ms: Length of a message.
        probe_ms: Interval of a stream's probes (served load only; see `client_load`).
        rate: Samples per second.
        audio: Recordings.
        seed: Of phases and of where in the recordings each stream begins.
        address: HOST:PORT of the server; empty: the engine alone.
        model: Of the server; empty: its only one.
        bundle: For the engine alone.
        precision: For the engine alone; empty: the bundle's default.
        lookahead_bias: The dial; None: the default.
        max_lookahead_ms: Hard cap; None: none.
    """

    streams: int
    seconds: float
    warmup: float
    chunk_ms: int
    probe_ms: int
    rate: int
    audio: tuple[str, ...]
    seed: int = 1
    address: str = ""
    model: str = ""
    bundle: str = ""
    precision: str = ""
    lookahead_bias: float | None = None
    max_lookahead_ms: int | None = None

    @property
    def chunk(self) -> float:
        """Seconds of a chunk."""
        return self.chunk_ms / 1000

    @property
    def size(self) -> int:
        """Samples of a chunk."""
        return self.rate * self.chunk_ms // 1000

    @property
    def count(self) -> int:
        """Chunks of each stream: enough that all streams run until the window ends."""
        return int((self.warmup + self.seconds) / self.chunk) + 1

    @property
    def probe_every(self) -> int:
        """A probe follows one chunk in so many."""
        return max(1, round(self.probe_ms / self.chunk_ms))

    def to_json(self) -> str:
        """For a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "audio": tuple(values["audio"])})


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of a plan.

    Attributes:
        index: Its number.
        phase: Seconds after the common start, less than a chunk.
        first: Index of its first chunk in the recordings.
        probe: Which of every `Plan.probe_every` chunks a probe follows.
    """

    index: int
    phase: float
    first: int
    probe: int

    def due(self, plan: Plan, k: int) -> float:
        """Seconds after the common start at which the last sample of chunk `k` has been spoken."""
        return self.phase + (k + 1) * plan.chunk

    def spoken(self, seconds: float) -> float:
        """Seconds after the common start at which `seconds` of this stream's audio have been spoken."""
        return self.phase + seconds


def streams(plan: Plan, chunks: int) -> list[Stream]:
    """The plan's streams; the recordings have so many `chunks`."""
    draw = random.Random(plan.seed)
    return [
        Stream(index, draw.random() * plan.chunk, draw.randrange(chunks), draw.randrange(plan.probe_every))
        for index in range(plan.streams)
    ]


def schedule(plan: Plan, members: list[Stream]) -> Iterator[tuple[float, Stream, int]]:
    """Every chunk of every stream as (due, stream, chunk), in the order in which they are due."""
    order = sorted(members, key=lambda stream: stream.phase)
    for k in range(plan.count):
        for stream in order:
            yield stream.due(plan, k), stream, k
