"""Frames of video and latent frames, and when a frame is due (ours). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeline:
    """Which video frames a latent frame decodes to: the first one to one, each later one to `scale`."""

    scale: int

    def first(self, latent: int) -> int:
        """Index of the first video frame of a latent frame; also how many frames the ones before it have."""
        return 1 + (latent - 1) * self.scale if latent else 0

    def latent(self, frame: int) -> int:
        """Index of the latent frame that a video frame comes from."""
        return 1 + (frame - 1) // self.scale if frame else 0


@dataclass(slots=True)
class Clock:
    """When the client plays which frame: frame n at ``origin + n / rate``, in monotonic seconds.

    A client that runs out of frames stalls, and plays what follows later by as much.
    """

    origin: float
    rate: float

    def due(self, frame: int) -> float:
        """When a frame is to be played."""
        return self.origin + frame / self.rate

    def came(self, frame: int, when: float) -> None:
        """A frame came at `when`: if that was too late, everything after it is due later."""
        self.origin = max(self.origin, when - frame / self.rate)
