"""Video.Stream: prompts and credit in, frames out, in the grammar of sessions.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message

from realtide.engines.longlive import types
from realtide.server import checkpoint
from realtide.server.host import Host
from realtide.server.models import VideoModel, of_checkpoint, select
from realtide.server.sessions import Plan, StreamSession, checkpoint_interval, new_session_id
from realtide.server.status import invalid, misfit
from realtide.server.video_fields import Fields, encoder_for, engine_options
from realtide.server.video_meter import VideoMeter
from realtide_client.v1 import common_pb2, video_pb2_grpc
from realtide_client.v1 import video_pb2 as pb

SERVICE = "realtide.v1.Video"


class VideoService(video_pb2_grpc.VideoServicer):
    """The gRPC service."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def Stream(  # type: ignore[override]  # the stubs know only generators, grpc coroutines too
        self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One session."""
        await VideoSession(self._host, context).run()


class VideoSession(StreamSession):
    """One video session; positions are frames, and what has been received is the credit."""

    service: ClassVar[str] = SERVICE
    response: ClassVar[Callable[..., Message]] = pb.VideoStreamResponse
    consumes: ClassVar[bool] = False

    def __init__(self, host: Host, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        super().__init__(host, context)
        self._options = pb.VideoOptions()
        self._interval = 0
        self._paused = False
        self._resuming = False
        self._sent = 0
        self._waiting = 0.0  # since when nothing is owed to the client, if nothing is

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self._options.frames_per_second

    # -- opening -----------------------------------------------------------------------------------------

    def plan_open(self, message: pb.VideoOpen) -> Plan:
        """Check every choice of the session."""
        model = select(self.host.models, VideoModel, message.session.model, "open.session.model")
        fields = Fields(model.info, self.config)
        if not message.HasField("options"):
            raise invalid("open.options", "missing, it is required")
        self._interval = checkpoint_interval(message.session, self.config, "open.session")
        self._options = fields.options(message.options, "open.options")
        fields.credit(message.credit, 0, 0, self._options, "open.credit")
        return self._plan_for(model, message.credit, None, lambda engine, options: engine.open(options))

    def plan_resume(self, header: checkpoint.Header, state: bytes) -> Plan:
        """Everything is as the checkpoint says, if this server's limits allow it."""
        setup = pb.VideoOpened()
        try:
            setup.ParseFromString(header.setup)
        except DecodeError:
            raise misfit("damaged setup") from None
        model = of_checkpoint(self.host.models, VideoModel, header.model)
        self._options = Fields(model.info, self.config).options(setup.options, "resume.checkpoint")
        self._paused = setup.paused
        self._interval = setup.session.checkpoint_interval_ms
        return self._plan_for(
            model, header.position, header, lambda engine, options: engine.restore(state, options)
        )

    def _plan_for(
        self,
        model: VideoModel,
        credit: int,
        resumed: checkpoint.Header | None,
        make: Callable[[Any, types.VideoOptions], Any],
    ) -> Plan:
        start = 0 if resumed is None else resumed.position
        self._sent, self._credit = start, credit
        self._resuming = resumed is not None  # until the first credit
        self._fields = Fields(model.info, self.config)
        self._encoder = encoder_for(self._options)
        options = engine_options(self._options, credit, self._encoder)
        self._meter = VideoMeter(
            self.host.metrics, model.metrics, model.rates, start, credit, paused=self._paused
        )
        return Plan(
            model=model,
            make=lambda engine: make(engine, options),
            session_id=new_session_id() if resumed is None else resumed.session_id,
            start=start,
            resumed=resumed is not None,
            checkpoint_interval=self._interval,
        )

    def opened(self, common: common_pb2.Opened) -> Message:
        """The server's first message."""
        self.received = self._credit
        self._waiting = time.monotonic()
        self._meter.begin()
        return pb.VideoOpened(
            session=common,
            options=self._options,
            limits=self._fields.limits(self.rate),
            credit=self._credit,
            paused=self._paused,
        )

    def setup(self) -> bytes:
        """The options and the pause in force."""
        session = common_pb2.Opened(checkpoint_interval_ms=self._interval)
        return pb.VideoOpened(session=session, options=self._options, paused=self._paused).SerializeToString()

    # -- input -------------------------------------------------------------------------------------------

    async def on_media(self, request: pb.VideoStreamRequest) -> None:
        """Check and queue a credit. One that adds nothing is a sign of life and goes no further."""
        position = request.credit.position
        self._fields.credit(position, self.received, self._sent, self._options, "credit.position")
        if position > self.received:
            if self._resuming:
                # A client that has frames beyond the checkpoint grants up to where it has them.
                self._encoder.start_at(position)
                self._resuming = False
            # Each is higher than the one before and there is a highest, so that few can be queued.
            self.received = position
            self._meter.credit(position)
            await self.put(types.Credit(position, time.monotonic()))

    def on_control(self, control: pb.VideoControl) -> tuple[Any, Callable[[], None]]:
        """Check and translate a control."""
        item = self._fields.control(control, self._options, self._sent)
        if isinstance(item, types.SetPrompt):
            if item.at is None:
                self._meter.prompt(item.control_id)
            return item, lambda: None  # in force only when a frame shows it: see `_prompt`
        return item, lambda: self._pause(isinstance(item, types.Pause))

    async def too_many_controls(self) -> None:
        """Refuse: to wait would hold up the credit, and so perhaps the frame that a control waits for."""
        most = self.config.max_pending_controls
        raise invalid(
            "control", f"{most} controls await their `applied` receipt already, no more are accepted"
        )

    def finish_item(self) -> Any:
        """The engine's end of input."""
        return types.Finish()

    def waiting_since(self, reading: float) -> float | None:
        """A client to whom frames are owed may be silent."""
        end = self._options.length_frames if self._options.HasField("length_frames") else self.received
        if self._sent < min(self.received, end) and not self._paused:
            return None
        return max(reading, self._waiting)

    def on_close(self, busy: float) -> None:
        """Free the encoder."""
        self._encoder.close()
        self._meter.close()

    # -- output ------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Frames sent so far."""
        return self._sent

    def covered(self, fed: int) -> int:
        """Frames sent so far: what the engine had handed out before it exported its state has been."""
        return self._sent

    def on_event(self, event: types.VideoEvent, position: int) -> Iterable[Message]:
        """Translate an event and take its measure."""
        if isinstance(event, types.Applied):
            return self.applied(event.control_id, event.position)
        if isinstance(event, types.Frames):
            return self._frames(event)
        if isinstance(event, types.PromptApplied):
            return [self._prompt(event)]
        self._meter.denoised(event.count)
        return []

    def _frames(self, event: types.Frames) -> Iterator[Message]:
        end = event.first + event.count
        if event.first != self._sent or end > self.received:
            problem = (
                f"engine gave frames {event.first} to {end - 1} after {self._sent}, credit {self.received}"
            )
            raise RuntimeError(problem)
        self._sent = end
        self._waiting = time.monotonic()
        self.processed = event.decoded
        self._meter.decoded(event.decoded)
        yield pb.VideoStreamResponse(
            frames=pb.VideoFrames(
                position=event.first,
                count=event.count,
                data=event.data.data,
                initialization=event.data.initialization,
                timing=self.timing(event.began),
            )
        )
        self._meter.delivered(end)
        self.advanced(end)

    def _prompt(self, event: types.PromptApplied) -> Message:
        self._options.prompt = event.prompt
        self._meter.applied(event)
        return pb.VideoStreamResponse(
            prompt_applied=pb.PromptApplied(
                control_id=event.control_id,
                prompt=event.prompt,
                first_frame=event.first,
                recache_seconds=event.recache,
                recached_latent_frames=event.replayed,
            )
        )

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        self._waiting = time.monotonic()
        self._meter.pause(paused)
