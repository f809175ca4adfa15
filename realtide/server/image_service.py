"""Image.Stream: conditions and requests in, images out, in the grammar of sessions.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message

from realtide.engines.easycontrol import types
from realtide.server import checkpoint
from realtide.server.host import Host
from realtide.server.image_fields import Fields, encoder_for
from realtide.server.models import ImageModel, of_checkpoint, select
from realtide.server.sessions import Plan, StreamSession, checkpoint_interval, new_session_id
from realtide.server.status import invalid, misfit
from realtide_client.v1 import common_pb2, image_pb2_grpc
from realtide_client.v1 import image_pb2 as pb

SERVICE = "realtide.v1.Image"


class ImageService(image_pb2_grpc.ImageServicer):
    """The gRPC service."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def Stream(  # type: ignore[override]  # the stubs know only generators, grpc coroutines too
        self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One session."""
        await ImageSession(self._host, context).run()


class ImageSession(StreamSession):
    """One image session; positions are images, and what has been received are the images asked for."""

    service: ClassVar[str] = SERVICE
    response: ClassVar[Callable[..., Message]] = pb.ImageStreamResponse
    consumes: ClassVar[bool] = False

    def __init__(self, host: Host, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        super().__init__(host, context)
        self._options = pb.ImageOptions()
        self._interval = 0
        self._kinds: dict[str, str] = {}  # of conditions by their ids
        self._done = 0  # images before this one are done or called off
        self._ended: set[int] = set()  # and these
        self._previewed = -1  # the last image that has shown a preview
        self._waiting = 0.0  # since when nothing is owed to the client, if nothing is

    @property
    def rate(self) -> float:
        """An image counts as a second of media."""
        return 1.0

    # -- opening -----------------------------------------------------------------------------------------

    def plan_open(self, message: pb.ImageOpen) -> Plan:
        """Check every choice of the session."""
        model = select(self.host.models, ImageModel, message.session.model, "open.session.model")
        if not message.HasField("options"):
            raise invalid("open.options", "missing, it is required")
        self._interval = checkpoint_interval(message.session, self.config, "open.session")
        self._options = Fields(model.info, self.config).options(message.options, "open.options")
        return self._plan_for(model, None, lambda engine, options: engine.open(options))

    def plan_resume(self, header: checkpoint.Header, state: bytes) -> Plan:
        """Everything is as the checkpoint says, if this server's limits allow it."""
        setup = pb.ImageOpened()
        try:
            setup.ParseFromString(header.setup)
        except DecodeError:
            raise misfit("damaged setup") from None
        model = of_checkpoint(self.host.models, ImageModel, header.model)
        self._options = Fields(model.info, self.config).options(setup.options, "resume.checkpoint")
        self._interval = setup.session.checkpoint_interval_ms
        return self._plan_for(model, header, lambda engine, options: engine.restore(state, options))

    def _plan_for(
        self,
        model: ImageModel,
        resumed: checkpoint.Header | None,
        make: Callable[[Any, types.ImageOptions], Any],
    ) -> Plan:
        start = 0 if resumed is None else resumed.position
        self._done = start
        self._model = model
        self._fields = Fields(model.info, self.config)
        options = types.ImageOptions(encode=encoder_for(self._options), start=start)
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
        self._waiting = time.monotonic()
        return pb.ImageOpened(session=common, options=self._options, limits=self._fields.limits())

    def setup(self) -> bytes:
        """The options."""
        session = common_pb2.Opened(checkpoint_interval_ms=self._interval)
        return pb.ImageOpened(session=session, options=self._options).SerializeToString()

    # -- input -------------------------------------------------------------------------------------------

    async def on_media(self, request: pb.ImageStreamRequest) -> None:
        """Check, decode and queue a condition. No message behind it is read before that."""
        upload = request.condition
        self._fields.upload(upload, self._kinds)
        pixels = await asyncio.to_thread(self._fields.picture, upload)
        self._kinds[upload.condition_id] = upload.kind
        await self.put(types.Condition(upload.condition_id, upload.kind, pixels))

    def on_control(self, control: pb.ImageControl) -> tuple[Any, Callable[[], None]]:
        """Check and translate a control."""
        item = self._fields.control(control, self._kinds)
        if isinstance(item, types.Generate):
            self.received += 1
        elif isinstance(item, types.Forget):
            del self._kinds[item.condition_id]
        return item, lambda: None

    async def too_many_controls(self) -> None:
        """Refuse: to wait would hold up a cancel behind them."""
        most = self.config.max_pending_controls
        raise invalid(
            "control", f"{most} controls await their `applied` receipt already, no more are accepted"
        )

    def finish_item(self) -> Any:
        """The engine's end of input."""
        return types.Finish()

    def waiting_since(self, reading: float) -> float | None:
        """A client to whom images are owed may be silent."""
        return None if self._done < self.received else max(reading, self._waiting)

    def on_close(self, busy: float) -> None:
        """Nothing is held here."""

    # -- output ------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Images that are done."""
        return self._done

    def covered(self, fed: int) -> int:
        """Images that are done: what the engine had handed out before it exported its state has been sent."""
        return self._done

    def on_event(self, event: types.ImageEvent, position: int) -> Iterable[Message]:
        """Translate an event and take its measure."""
        if isinstance(event, types.Applied):
            return self.applied(event.control_id, event.position)
        if isinstance(event, types.Progress):
            self._waiting = time.monotonic()
            told = pb.ImageProgress(position=event.position, step=event.step, steps=event.steps)
            return [pb.ImageStreamResponse(progress=told)]
        if isinstance(event, types.Preview):
            return [self._preview(event)]
        if isinstance(event, types.Image):
            return self._image(event)
        if isinstance(event, types.Conditioned):
            return [self._conditioned(event)]
        self._end(event.position)
        gone = pb.ImageCancelled(position=event.position, control_id=event.control_id)
        return [pb.ImageStreamResponse(cancelled=gone)]

    def _preview(self, event: types.Preview) -> Message:
        if event.position > self._previewed:
            self._previewed = event.position
            seconds = time.monotonic() - event.received
            self._model.metrics.observe(self.host.metrics.first_preview, seconds)
        return pb.ImageStreamResponse(
            preview=pb.ImagePreview(
                position=event.position,
                step=event.step,
                width=event.width,
                height=event.height,
                data=event.data,
                timing=self.timing(event.received),
            )
        )

    def _image(self, event: types.Image) -> Iterable[Message]:
        self._end(event.position)
        yield pb.ImageStreamResponse(
            image=pb.GeneratedImage(
                position=event.position,
                control_id=event.control_id,
                width=event.width,
                height=event.height,
                seed=event.seed,
                data=event.data,
                timing=self.timing(event.received),
            )
        )
        self._model.metrics.image(time.monotonic() - event.received)
        self.advanced(self._done)

    def _conditioned(self, event: types.Conditioned) -> Message:
        self._model.metrics.conditions(event.hits, event.misses)
        return pb.ImageStreamResponse(
            conditions_ready=pb.ConditionsReady(
                position=event.position, hits=event.hits, misses=event.misses, seconds=event.seconds
            )
        )

    def _end(self, position: int) -> None:
        # One that was called off before its turn ends before those ahead of it.
        self._ended.add(position)
        while self._done in self._ended:
            self._ended.remove(self._done)
            self._done += 1
        self.processed = self._done
        self._waiting = time.monotonic()
