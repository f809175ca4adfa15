"""A small real Video server that follows the stream grammar to the letter and misbehaves on request.

Its "video": a frame's bytes tell its index, the seed, and every change of the prompt up to it. So a lost or
repeated frame shows, and so does one that was generated again with another history.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2

from realtide_client.v1 import common_pb2, models_pb2, models_pb2_grpc, video_pb2, video_pb2_grpc
from tests.clients.scripted import rich_status

FIRST, BLOCK = 3, 4  # frames of the first block and of every other
MAX_CREDIT = 64
RATE = 16.0
WIDTH, HEIGHT = 8, 4
Response = video_pb2.VideoStreamResponse
H264 = video_pb2.VIDEO_ENCODING_H264_FMP4


def block_at(frame: int) -> int:
    """Begin of the first block that begins at `frame` or later."""
    return 0 if frame <= 0 else FIRST + -(-max(frame - FIRST, 0) // BLOCK) * BLOCK


@dataclass
class Script:
    """What goes wrong, by connection: the first call is number 0."""

    drop_at: dict[int, int] = field(default_factory=dict)  # UNAVAILABLE after so many frames in a call
    going_away_at: dict[int, int] = field(default_factory=dict)  # likewise, by frames
    checkpoint_every: int = 6  # frames; 0: never
    drop_before_receipts: bool = False  # UNAVAILABLE instead of the first control's receipts
    drop_after_last: bool = False  # UNAVAILABLE once, instead of OK
    linger: bool = False  # the end waits for the client's
    initialization: dict[int, bytes] = field(default_factory=dict)  # of H.264, by connection
    refuse: int = 0  # so many first calls are refused


@dataclass
class State:
    """A session: what a checkpoint holds."""

    encoding: int
    seed: int
    length: int | None
    rate: float
    position: int = 0  # frames sent
    history: list[tuple[int, str]] = field(default_factory=list)  # prompts by first frame
    paused: bool = False

    def dump(self) -> bytes:
        return json.dumps(self.__dict__).encode()

    @classmethod
    def load(cls, data: bytes) -> State:
        fields = json.loads(data)
        fields["history"] = [(frame, prompt) for frame, prompt in fields["history"]]
        return cls(**fields)

    @property
    def begun(self) -> int:
        """End of the block that the last sent frame belongs to."""
        return block_at(self.position)

    def frame(self, index: int) -> bytes:
        changes = [change for change in self.history if change[0] <= index]
        return frame_of(index, self.seed, *changes, encoding=self.encoding)


def frame_of(index: int, seed: int, *history: tuple[int, str], encoding: int = 2) -> bytes:
    """What a frame of the scripted video is."""
    text = f"{index} {seed} {list(history)};".encode()
    if encoding == video_pb2.VIDEO_ENCODING_RAW_RGB:
        return text[:96].ljust(3 * WIDTH * HEIGHT, b" ")
    return text


@dataclass
class Call:
    """What one connection knows besides the session."""

    number: int
    credit: int
    sent: int = 0
    finished: bool = False
    gone: bool = False
    waiting: list[tuple[str, str, int | None]] = field(default_factory=list)  # prompts: id, text, frame
    out: list[Response] = field(default_factory=list)
    error: tuple[grpc.StatusCode, str, str] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedVideo(video_pb2_grpc.VideoServicer, models_pb2_grpc.ModelsServicer):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls = 0
        self.opens: list[video_pb2.VideoOpen] = []
        self.resumes: list[int] = []  # positions
        self.credits: list[list[int]] = []  # by call
        self.controls: list[list[video_pb2.VideoControl]] = []  # by call
        self.asked: list[str] = []
        self.half_closed: list[int] = []  # calls whose client has closed its side
        self.ended: list[str] = []
        self.open_calls: dict[int, Call] = {}
        self.sent: list[int] = []  # by call

    async def Stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Response]:
        number = self.calls
        self.calls += 1
        self.credits.append([])
        self.controls.append([])
        self.sent.append(0)
        if number < self.script.refuse:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "refused by the script")
        first = await anext(aiter(requests))
        state, opened = await self._open(first, context)
        call = Call(number, opened.credit)
        self.open_calls[number] = call
        yield Response(opened=opened)
        reading = asyncio.create_task(self._listen(state, call, requests))
        outcome = "cancelled"
        try:
            async for response in self._run(state, call, context):
                yield response
            # A cancelled call may look as if its client had closed its side: reading ends either way.
            outcome = "cancelled" if context.cancelled() else "ok"
        finally:
            reading.cancel()
            self.ended.append(outcome)

    async def _open(self, first: Any, context: Any) -> tuple[State, video_pb2.VideoOpened]:
        kind = first.WhichOneof("message")
        if kind == "open":
            self.opens.append(first.open)
            options = first.open.options
            if not options.prompt:
                await self._invalid(context, "open.options.prompt", "is required")
            if options.HasField("frames_per_second") and not 1 <= options.frames_per_second <= 60:
                await self._invalid(context, "open.options.frames_per_second", "must be 1 to 60")
            if first.open.credit > MAX_CREDIT:
                await self._invalid(context, "open.credit", f"must be at most {MAX_CREDIT}")
            state = State(
                encoding=options.encoding,
                seed=options.seed if options.HasField("seed") else 1000 + self.calls,
                length=options.length_frames if options.HasField("length_frames") else None,
                rate=options.frames_per_second if options.HasField("frames_per_second") else RATE,
                history=[(0, options.prompt)],
            )
            credit = first.open.credit
        elif kind == "resume":
            try:
                state = State.load(first.resume.checkpoint)
            except ValueError:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the checkpoint is damaged")
                raise
            self.resumes.append(state.position)
            credit = state.position
        else:
            await self._invalid(context, "message", "the first message must be open or resume")
        return state, video_pb2.VideoOpened(
            session=common_pb2.Opened(
                session_id="v-1", model="scripted", resumed=kind == "resume", position=state.position
            ),
            options=video_pb2.VideoOptions(
                prompt=state.history[-1][1],
                width=WIDTH,
                height=HEIGHT,
                frames_per_second=state.rate,
                seed=state.seed,
                length_frames=state.length,
                encoding=state.encoding,  # type: ignore[arg-type]
            ),
            limits=video_pb2.VideoLimits(
                min_frames_per_second=1, max_frames_per_second=60, max_credit_frames=MAX_CREDIT
            ),
            credit=credit,
            paused=state.paused,
        )

    async def _listen(self, state: State, call: Call, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            problem = self._take(state, call, request)
            if problem is not None:
                call.error = (grpc.StatusCode.INVALID_ARGUMENT, *problem)
            call.changed.set()
        self.half_closed.append(call.number)
        call.finished = True  # as the real one takes it
        call.changed.set()

    def _take(self, state: State, call: Call, request: Any) -> tuple[str, str] | None:
        if call.finished:
            return "message", "came after finish"
        match request.WhichOneof("message"):
            case "credit":
                position = request.credit.position
                self.credits[call.number].append(position)
                if position < call.credit:
                    return "credit.position", f"must be at least {call.credit}"
                if position > state.position + MAX_CREDIT:
                    return "credit.position", f"must be at most {state.position + MAX_CREDIT}"
                call.credit = position
            case "control":
                return self._control(state, call, request.control)
            case "checkpoint_request":
                self.asked.append(request.checkpoint_request.request_id)
                call.out.append(self._checkpoint(state, request.checkpoint_request.request_id))
            case "finish":
                call.finished = True
            case _:
                return "message", "is required"
        return None

    def _control(self, state: State, call: Call, control: video_pb2.VideoControl) -> tuple[str, str] | None:
        self.controls[call.number].append(control)
        if self.script.drop_before_receipts:
            self.script.drop_before_receipts = False
            call.error = (grpc.StatusCode.UNAVAILABLE, "dropped by the script", "")
            return None
        key = control.control_id
        if key in [waiting[0] for waiting in call.waiting]:
            return "control.control_id", "is in use"
        at = state.position
        accepted = Response(accepted=common_pb2.ControlAccepted(control_id=key, position=at))
        match control.WhichOneof("action"):
            case "set_prompt":
                change = control.set_prompt
                frame = change.at_frame if change.HasField("at_frame") else None
                if frame is not None and frame < state.position:
                    return "control.set_prompt.at_frame", f"must be at least {state.position}"
                if frame is not None and state.length is not None and frame >= state.length:
                    return "control.set_prompt.at_frame", f"must be less than {state.length}"
                call.waiting.append((key, change.prompt, frame))
                call.out.append(accepted)
                return None
            case "pause":
                state.paused = True
            case "resume_playback":
                state.paused = False
            case _:
                return "control.action", "is required"
        call.out += [accepted, Response(applied=common_pb2.ControlApplied(control_id=key, position=at))]
        return None

    async def _run(self, state: State, call: Call, context: Any) -> AsyncIterator[Response]:
        """Send what may be sent; a frame (or fragment) a turn, so that requests come in between."""
        last_checkpoint = state.position
        if call.number == 0:
            yield self._prompt_applied(state, "")
        while True:
            if call.error is not None:
                code, name, description = call.error
                if code is grpc.StatusCode.INVALID_ARGUMENT:
                    await self._invalid(context, name, description)
                await context.abort(code, name)
            while call.out:
                yield call.out.pop(0)
            if state.position == state.begun:
                for response in self._apply(state, call):
                    yield response
            if call.finished and (state.position >= call.credit or state.paused):
                return
            end = min(call.credit, state.length if state.length is not None else 1 << 60)
            if state.position >= end or state.paused:
                if state.length is not None and state.position >= state.length:
                    if self.script.drop_after_last:
                        self.script.drop_after_last = False
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the script")
                    if self.script.linger:
                        async with asyncio.timeout(10):
                            while call.number not in self.half_closed:
                                await asyncio.sleep(0.005)
                    return
                call.changed.clear()
                await call.changed.wait()
                continue
            yield self._frames(state, call, end)
            if (
                self.script.checkpoint_every
                and state.position - last_checkpoint >= self.script.checkpoint_every
            ):
                last_checkpoint = state.position
                yield self._checkpoint(state)
            if call.sent >= self.script.going_away_at.get(call.number, 1 << 60) and not call.gone:
                call.gone = True
                checkpoint = self._checkpoint(state).checkpoint
                yield Response(going_away=common_pb2.GoingAway(deadline_ms=30_000, checkpoint=checkpoint))
            if call.sent >= self.script.drop_at.get(call.number, 1 << 60):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the script")
            await asyncio.sleep(0)

    def _apply(self, state: State, call: Call) -> list[Response]:
        """Prompts that are due with the block that begins here."""
        due = [one for one in call.waiting if one[2] is None or one[2] <= state.position]
        call.waiting = [one for one in call.waiting if one not in due]
        responses = [
            Response(applied=common_pb2.ControlApplied(control_id=key, position=state.position))
            for key, _, _ in due
        ]
        if due:
            state.history.append((state.position, due[-1][1]))
            responses.append(self._prompt_applied(state, due[-1][0]))
        return responses

    def _prompt_applied(self, state: State, key: str) -> Response:
        frame, prompt = state.history[-1]
        return Response(
            prompt_applied=video_pb2.PromptApplied(
                control_id=key,
                prompt=prompt,
                first_frame=frame,
                recache_seconds=0.5 if key else 0.0,
                recached_latent_frames=3 if key else 0,
            )
        )

    def _frames(self, state: State, call: Call, end: int) -> Response:
        first, count, initialization = state.position, 1, b""
        if state.encoding == H264:
            block = block_at(first + 1)
            count = min(block, end) - first
            if call.sent == 0:
                initialization = self.script.initialization.get(call.number, b"init;")
        state.position += count
        call.sent += count
        self.sent[call.number] += count
        return Response(
            frames=video_pb2.VideoFrames(
                position=first,
                count=count,
                data=b"".join(state.frame(first + n) for n in range(count)),
                initialization=initialization,
                timing=common_pb2.Timing(
                    received_position=call.credit, processed_position=state.position, processing_seconds=0.01
                ),
            )
        )

    def _checkpoint(self, state: State, request_id: str = "") -> Response:
        message = common_pb2.Checkpoint(data=state.dump(), position=state.position, request_id=request_id)
        return Response(checkpoint=message)

    async def _invalid(self, context: Any, name: str, description: str) -> NoReturn:
        violation = error_details_pb2.BadRequest.FieldViolation(field=name, description=description)
        details = rich_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            "invalid request",
            error_details_pb2.BadRequest(field_violations=[violation]),
        )
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid request", details)
        raise AssertionError("abort returns never")

    async def ListModels(self, request: Any, context: Any) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=[models_pb2.Model(name="scripted", engine="longlive")])

    async def DescribeModel(self, request: Any, context: Any) -> models_pb2.DescribeModelResponse:
        return models_pb2.DescribeModelResponse(model=models_pb2.Model(name="scripted"))
