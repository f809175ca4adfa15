"""grpc.health.v1, kept up to date by a task of its own."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from realtide.server import image_service, models_service, speech_service, video_service
from realtide.server.host import Host
from realtide.server.models import ImageModel, ServedModel, SpeechModel, VideoModel

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthReporter:
    """Reports the health of each service.

    Speech, Video and Image are NOT_SERVING when none of their models can take a session at once, and all
    services when the server drains.

    The server as a whole (service "") stays SERVING when it is merely full, unless `full_is_unhealthy`: a
    full pod is well, and a liveness probe must not kill it. A model whose engine has failed makes the whole
    NOT_SERVING.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.servicer = HealthServicer()
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Something happened that may change the state."""
        self._changed.set()

    def state(self) -> dict[str, bool]:
        """Whether each service serves, by name."""
        models = self._host.models.values()
        draining = self._host.drain_until is not None
        failed = any(model.failed for model in models)

        def free(kind: type[ServedModel]) -> bool:
            return any(
                not (model.failed or model.admission.full) for model in models if isinstance(model, kind)
            )

        healthy = free(ServedModel) or not self._host.config.full_is_unhealthy
        return {
            "": not draining and not failed and healthy,
            speech_service.SERVICE: free(SpeechModel) and not draining,
            video_service.SERVICE: free(VideoModel) and not draining,
            image_service.SERVICE: free(ImageModel) and not draining,
            models_service.SERVICE: not draining,
        }

    async def run(self) -> None:
        """Publish changes until cancelled. A task, because a watcher that does not read can hold up `set`."""
        published: dict[str, bool] = {}
        while True:
            self._changed.clear()
            for service, serves in self.state().items():
                if published.get(service) != serves:
                    await self.servicer.set(service, _SERVING if serves else _NOT_SERVING)
                    published[service] = serves
            await self._changed.wait()
