"""What the processes that make a load of video are told (ours)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PROMPTS = (
    "a red apple moves to the right on a blue background",
    "a red apple moves up on a blue background",
)


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """A load.

    Attributes:
        part: rate: `streams` endless videos, as fast as they come. first: videos one after the other, each
            left at its first frame. switch: one video whose prompt is changed `count` times. long: one video
            of `frames`.
        streams: Videos at the same time.
        silent: Neighbours that ask for all that they may get and read nothing of it.
        seconds: Length of the measured window.
        warmup: Seconds before it, with all videos running.
        count: How often, where something is done several times.
        warmup_blocks: Of a young video, before its blocks are set against an old one's.
        frames: Length of a long video; frames between changes of the prompt.
        pace: Take frames as they would be played.
        buffer_seconds: Video that may be made ahead of what was taken.
        encoding: raw_rgb, jpeg or h264.
        seed: Of the first video; the others' follow.
        prompts: The one of all videos, and those that changes take in turn.
        address: HOST:PORT of the server; empty: the engine alone.
        model: Of the server.
        bundle: For the engine alone.
        precision: For the engine alone; empty: the bundle's default.
        threads: Of one program, for the engine alone.
    """

    part: Literal["rate", "first", "switch", "long"] = "rate"
    streams: int = 1
    silent: int = 0
    seconds: float = 8.0
    warmup: float = 2.0
    count: int = 1
    warmup_blocks: int = 0
    frames: int = 0
    pace: bool = False
    buffer_seconds: float = 2.0
    encoding: Literal["raw_rgb", "jpeg", "h264"] = "h264"
    seed: int = 1
    prompts: tuple[str, ...] = field(default=PROMPTS)
    address: str = ""
    model: str = ""
    bundle: str = ""
    precision: str = ""
    threads: int = 1

    def to_json(self) -> str:
        """For a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> VideoPlan:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "prompts": tuple(values["prompts"])})


class Meter:
    """Frames of one video within the measured window; times on the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self.begin = float("inf")
        self.end = float("inf")
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        self.intervals: list[float] = []  # between arrivals

    def came(self, when: float, end: int) -> None:
        """Frames up to `end` were there at `when`."""
        if not self.begin <= when < self.end:
            return
        if self._last is not None:
            self.intervals.append(when - self._last[0])
        self._first = self._first or (when, end)
        self._last = (when, end)

    @property
    def frames_per_second(self) -> float:
        """Between the first and the last arrival in the window; 0 with less than two."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return 0.0
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
