"""A server of images over the small engine, and messages for it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from PIL import Image

from realtide_client.v1 import common_pb2, image_pb2, image_pb2_grpc
from tests.engines.easycontrol.small import Small
from tests.server.helpers import Live, connected

Request = image_pb2.ImageStreamRequest
RAW, JPEG, PNG = (
    image_pb2.IMAGE_ENCODING_RAW_RGB,
    image_pb2.IMAGE_ENCODING_JPEG,
    image_pb2.IMAGE_ENCODING_PNG,
)


class Images(Live):
    """A server of images."""

    def stream(self, **options: Any) -> Any:
        stub: Any = image_pb2_grpc.ImageStub(self.channel)
        return stub.Stream(**options)

    async def opened(self, **options: Any) -> Any:
        """A stream that has been opened."""
        call = self.stream()
        await call.write(opening(**options))
        response = await call.read()
        assert response.WhichOneof("message") == "opened", response
        return call


@contextlib.asynccontextmanager
async def serving(small: Small | None = None, **settings: Any) -> AsyncIterator[Images]:
    """Start a server around a small engine."""
    small = small or Small()
    engine: Any = small.engine
    async with connected([engine], **settings) as (server, channel):
        yield Images(server, small.engine, channel)


def opening(
    encoding: int = RAW, session: common_pb2.SessionOptions | None = None, **options: Any
) -> image_pb2.ImageStreamRequest:
    chosen = image_pb2.ImageOptions(encoding=encoding, **options)  # type: ignore[arg-type]
    return Request(open=image_pb2.ImageOpen(session=session, options=chosen))


def picture(seed: int = 1, size: tuple[int, int] = (32, 32), form: str = "PNG", **how: Any) -> bytes:
    """A file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, form, **how)
    return written.getvalue()


def upload(
    name: str = "sketch", kind: str = "canny", data: bytes | None = None
) -> image_pb2.ImageStreamRequest:
    content = picture() if data is None else data
    return Request(condition=image_pb2.ConditionUpload(condition_id=name, kind=kind, data=content))


def wanting(
    control_id: str = "one", *conditions: tuple[str, float | None], **choices: Any
) -> image_pb2.ImageStreamRequest:
    """A request of an image."""
    chosen: dict[str, Any] = {"prompt": "a red apple", "width": 32, "height": 24, "steps": 3, "seed": 7}
    generate = image_pb2.Generate(
        conditions=[
            image_pb2.ImageCondition(condition_id=name, weight=weight) for name, weight in conditions
        ],
        **(chosen | choices),
    )
    return Request(control=image_pb2.ImageControl(control_id=control_id, generate=generate))


def cancelling(control_id: str, target: str) -> image_pb2.ImageStreamRequest:
    cancel = image_pb2.CancelImage(control_id=target)
    return Request(control=image_pb2.ImageControl(control_id=control_id, cancel=cancel))


def forgetting(control_id: str, name: str) -> image_pb2.ImageStreamRequest:
    forget = image_pb2.ForgetCondition(condition_id=name)
    return Request(control=image_pb2.ImageControl(control_id=control_id, forget=forget))


def finishing() -> image_pb2.ImageStreamRequest:
    return Request(finish=common_pb2.Finish())


def checkpointing(request_id: str = "") -> image_pb2.ImageStreamRequest:
    return Request(checkpoint_request=common_pb2.CheckpointRequest(request_id=request_id))


def kinds(found: list[Any]) -> list[str]:
    """What responses are."""
    return [response.WhichOneof("message") for response in found]


def images_of(found: list[Any]) -> list[image_pb2.GeneratedImage]:
    """The images among responses."""
    return [response.image for response in found if response.WhichOneof("message") == "image"]


async def until_kind(call: Any, kind: str, found: list[Any] | None = None) -> Any:
    """Read until a response of this kind."""
    while True:
        response = await call.read()
        assert response, f"the stream ended before {kind}: {await call.code()} {await call.details()}"
        if found is not None:
            found.append(response)
        if response.WhichOneof("message") == kind:
            return getattr(response, kind)
