"""What all streams of a server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from realtide.server.config import ServerConfig
from realtide.server.metrics import Metrics
from realtide.server.models import ServedModel

if TYPE_CHECKING:
    from realtide.server.sessions import StreamSession


@dataclass(slots=True)
class Host:
    """Configuration, models and open streams of one server."""

    config: ServerConfig
    metrics: Metrics
    version: str
    models: dict[str, ServedModel] = field(default_factory=dict)
    streams: set[StreamSession] = field(default_factory=set)
    # Loop time at which streams are cut; None while the server takes sessions.
    drain_until: float | None = None

    def drain(self) -> None:
        """Take no more sessions and tell every stream to go elsewhere. Any number of times."""
        if self.drain_until is not None:
            return
        seconds = self.config.drain_seconds
        self.drain_until = asyncio.get_running_loop().time() + seconds
        for model in self.models.values():
            model.admission.drain()
        for stream in list(self.streams):
            stream.drain(seconds)
