"""A real server of video and a raw gRPC client for the tests, on top of `tests.server.helpers`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from realtide.server.models import AnyEngine, VideoEngine
from realtide_client.v1 import common_pb2, video_pb2, video_pb2_grpc
from tests.server.helpers import Live, connected
from tests.server.video_engine import ClipEngine

Request = video_pb2.VideoStreamRequest
RAW, JPEG, H264 = (
    video_pb2.VIDEO_ENCODING_RAW_RGB,
    video_pb2.VIDEO_ENCODING_JPEG,
    video_pb2.VIDEO_ENCODING_H264_FMP4,
)


class Clips(Live):
    """A server of video."""

    engine: ClipEngine

    def stream(self, **options: Any) -> Any:
        stub: Any = video_pb2_grpc.VideoStub(self.channel)
        return stub.Stream(**options)

    async def opened(self, **options: Any) -> Any:
        """A stream that has been opened."""
        call = self.stream()
        await call.write(opening(**options))
        response = await call.read()
        assert response.WhichOneof("message") == "opened", response
        return call

    async def resumed(self, checkpoint: bytes) -> tuple[Any, Any]:
        """A stream that goes on from a checkpoint, and what it said first."""
        call = self.stream()
        await call.write(Request(resume=common_pb2.Resume(checkpoint=checkpoint)))
        response = await call.read()
        assert response.WhichOneof("message") == "opened", response
        return call, response.opened


@contextlib.asynccontextmanager
async def clips(
    engine: VideoEngine | None = None, more: Sequence[AnyEngine] = (), **settings: Any
) -> AsyncIterator[Clips]:
    """Start a server around `engine`."""
    engine = engine or ClipEngine()
    async with connected([engine, *more], **settings) as (server, channel):
        yield Clips(server, engine, channel)


def opening(
    prompt: str = "a fish",
    encoding: int = RAW,
    credit: int = 0,
    session: common_pb2.SessionOptions | None = None,
    **options: Any,
) -> video_pb2.VideoStreamRequest:
    values = video_pb2.VideoOptions(prompt=prompt, encoding=encoding, **options)  # type: ignore[arg-type]
    return Request(open=video_pb2.VideoOpen(session=session, options=values, credit=credit))


def credit(position: int) -> video_pb2.VideoStreamRequest:
    return Request(credit=common_pb2.Credit(position=position))


def control(control_id: str, **action: Any) -> video_pb2.VideoStreamRequest:
    return Request(control=video_pb2.VideoControl(control_id=control_id, **action))


def prompting(control_id: str, prompt: str, at_frame: int | None = None) -> video_pb2.VideoStreamRequest:
    return control(control_id, set_prompt=video_pb2.SetPrompt(prompt=prompt, at_frame=at_frame))


def pausing(control_id: str) -> video_pb2.VideoStreamRequest:
    return control(control_id, pause=video_pb2.PausePlayback())


def playing(control_id: str) -> video_pb2.VideoStreamRequest:
    return control(control_id, resume_playback=video_pb2.ResumePlayback())


def checkpointing(request_id: str = "") -> video_pb2.VideoStreamRequest:
    return Request(checkpoint_request=common_pb2.CheckpointRequest(request_id=request_id))


def finishing() -> video_pb2.VideoStreamRequest:
    return Request(finish=common_pb2.Finish())


async def until_kind(call: Any, kind: str, found: list[Any] | None = None) -> Any:
    """Read up to the first message of `kind` and give it; everything that came goes into `found`."""
    found = [] if found is None else found
    while True:
        found.append(await call.read())
        if found[-1].WhichOneof("message") == kind:
            return getattr(found[-1], kind)


async def until_frame(call: Any, end: int, found: list[Any] | None = None) -> list[Any]:
    """Read until all frames below `end` are there; gives everything that came."""
    found = [] if found is None else found
    last = 0
    while last < end:
        response = await call.read()
        found.append(response)
        if response.WhichOneof("message") == "frames":
            last = response.frames.position + response.frames.count
    assert last == end, f"{last} frames for a credit of {end}"
    return found


def frames_of(found: list[Any]) -> list[Any]:
    """The frames among messages; they come without gaps."""
    frames = [one.frames for one in found if one.WhichOneof("message") == "frames"]
    for before, after in itertools.pairwise(frames):
        assert after.position == before.position + before.count
    return frames


def essence(found: list[Any]) -> list[Any]:
    """What a video shows, whatever else was said: its frames, and the prompts where they begin."""
    kept: list[Any] = []
    for one in found:
        kind = one.WhichOneof("message")
        if kind == "frames":
            kept.append((one.frames.position, one.frames.count, one.frames.data))
        elif kind == "prompt_applied":
            kept.append((one.prompt_applied.first_frame, one.prompt_applied.prompt))
    return kept
