"""A small real gRPC server that follows the stream grammar and misbehaves on request.

Its "recognizer" cuts an utterance every `UTTERANCE` samples; the text is the checksum of just these samples,
so a lost, repeated or reordered sample shows in the text.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from realtide_client.v1 import common_pb2, models_pb2, models_pb2_grpc, speech_pb2, speech_pb2_grpc

UTTERANCE = 1600  # samples
Response = speech_pb2.SpeechStreamResponse


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def rich_status(code: grpc.StatusCode, message: str, *details: Message) -> tuple[tuple[str, bytes], ...]:
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)


@dataclass
class Script:
    """What goes wrong, by connection: the first call is number 0."""

    refuse: int = 0  # so many first calls are refused with RESOURCE_EXHAUSTED and RetryInfo
    retry_seconds: float = 0.01
    drop_at: dict[int, int] = field(default_factory=dict)  # UNAVAILABLE once so many samples came in a call
    going_away_at: dict[int, int] = field(default_factory=dict)  # going_away once so many samples came
    deadline_ms: int = 30_000
    refuse_while_draining: int = 0  # so many calls after a going_away find a server that takes none
    checkpoint_every: int = 4000  # samples; 0: never
    silent_opens: int = 0  # so many first calls are never answered
    drop_after_applied: bool = False  # UNAVAILABLE right after the first control has been applied


@dataclass
class State:
    """A session: what a checkpoint holds."""

    position: int = 0  # samples consumed, all utterances and the rest
    utterance: int = 0
    rest: bytes = b""
    encoding: speech_pb2.AudioEncoding.ValueType = speech_pb2.AUDIO_ENCODING_LINEAR16
    rate: int = 16000
    biases: list[tuple[int, float]] = field(default_factory=list)

    def dump(self) -> bytes:
        return json.dumps({**self.__dict__, "rest": self.rest.hex()}).encode()

    @classmethod
    def load(cls, data: bytes) -> State:
        fields = json.loads(data)
        fields["rest"] = bytes.fromhex(fields["rest"])
        fields["biases"] = [(p, b) for p, b in fields["biases"]]
        return cls(**fields)

    @property
    def width(self) -> int:
        return 4 if self.encoding == speech_pb2.AUDIO_ENCODING_FLOAT32 else 2


class ScriptedSpeech(speech_pb2_grpc.SpeechServicer, models_pb2_grpc.ModelsServicer):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls = 0
        self.opens: list[speech_pb2.SpeechOpen] = []
        self.resumes: list[int] = []  # positions
        self.metadata: list[dict[str, Any]] = []
        self.asked: list[str] = []  # ids of checkpoint requests
        self.ended: list[str] = []  # how each call ended
        self.states: dict[int, State] = {}  # by call, once it is open
        self.draining = 0

    @property
    def last(self) -> State:
        """The session as the newest call has it."""
        return self.states[max(self.states)]

    async def Stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Response]:
        number = self.calls
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        if number < self.script.silent_opens:
            await asyncio.Event().wait()
        if number < self.script.refuse:
            await self._abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "all slots are taken",
                error_details_pb2.RetryInfo(
                    retry_delay=duration_pb2.Duration(nanos=int(self.script.retry_seconds * 1e9))
                ),
            )
        if self.draining:
            self.draining -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        first = await anext(aiter(requests))
        state, opened = await self._open(first, context)
        self.states[number] = state
        yield Response(opened=opened)
        outcome = "cancelled"
        try:
            async for response in self._run(number, state, requests, context):
                yield response
            outcome = "ok"
        finally:
            self.ended.append(outcome)

    async def _open(self, first: Any, context: Any) -> tuple[State, speech_pb2.SpeechOpened]:
        kind = first.WhichOneof("message")
        if kind == "open":
            self.opens.append(first.open)
            audio = first.open.audio
            if not 8000 <= audio.sample_rate_hz <= 48000:
                await self._invalid(context, "open.audio.sample_rate_hz", "must be 8000 to 48000")
            state = State(encoding=audio.encoding, rate=audio.sample_rate_hz)
        elif kind == "resume":
            try:
                state = State.load(first.resume.checkpoint)
            except ValueError:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the checkpoint is damaged")
                raise
            self.resumes.append(state.position)
        else:
            await self._invalid(context, "message", "the first message must be open or resume")
        return state, speech_pb2.SpeechOpened(
            session=common_pb2.Opened(
                session_id="s-1",
                model="scripted",
                resumed=kind == "resume",
                position=state.position,
                limits=common_pb2.Limits(max_message_bytes=4096),
            ),
            audio=speech_pb2.AudioFormat(encoding=state.encoding, sample_rate_hz=state.rate),
            frame_seconds=0.04,
        )

    async def _run(
        self, number: int, state: State, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Response]:
        received = 0
        next_checkpoint = state.position + self.script.checkpoint_every
        went_away = False
        async for request in requests:
            match request.WhichOneof("message"):
                case "audio":
                    if request.ByteSize() > 4096:
                        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large")
                    if request.audio.position != state.position:
                        await self._invalid(context, "audio.position", f"must be {state.position}")
                    for response in self._audio(state, request.audio.data):
                        yield response
                    received += len(request.audio.data) // state.width
                    if self.script.checkpoint_every and state.position >= next_checkpoint:
                        next_checkpoint = state.position + self.script.checkpoint_every
                        yield Response(checkpoint=self._checkpoint(state))
                    if received >= self.script.going_away_at.get(number, 1 << 60) and not went_away:
                        went_away = True
                        self.draining = self.script.refuse_while_draining
                        yield Response(
                            going_away=common_pb2.GoingAway(
                                deadline_ms=self.script.deadline_ms, checkpoint=self._checkpoint(state)
                            )
                        )
                    if received >= self.script.drop_at.get(number, 1 << 60):
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the script")
                case "control":
                    control = request.control
                    if control.WhichOneof("action") is None:
                        await self._invalid(context, "control.action", "is required")
                    at = {"control_id": control.control_id, "position": state.position}
                    yield Response(accepted=common_pb2.ControlAccepted(**at))
                    if control.HasField("flush"):
                        yield Response(final=self._final(state, len(state.rest), "FLUSH"))
                    if control.HasField("set_lookahead"):
                        state.biases.append((state.position, control.set_lookahead.bias))
                    yield Response(applied=common_pb2.ControlApplied(**at, delay_seconds=0.001))
                    if self.script.drop_after_applied:
                        self.script.drop_after_applied = False
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the script")
                case "checkpoint_request":
                    request_id = request.checkpoint_request.request_id
                    self.asked.append(request_id)
                    yield Response(checkpoint=self._checkpoint(state, request_id))
                case "finish":
                    if state.rest:
                        yield Response(final=self._final(state, len(state.rest), "FINISH"))
                    return
                case _:
                    await self._invalid(context, "message", "is required")
        raise asyncio.CancelledError  # the client went away without `finish`

    def _audio(self, state: State, data: bytes) -> list[Response]:
        state.rest += data
        state.position += len(data) // state.width
        responses = []
        cut = UTTERANCE * state.width
        while len(state.rest) >= cut:
            end = speech_pb2.EndpointEvent(
                kind=speech_pb2.ENDPOINT_KIND_END,
                at_seconds=(state.utterance + 1) * UTTERANCE / state.rate,
                utterance=state.utterance,
            )
            responses += [
                Response(final=self._final(state, cut, "ENDPOINT")),
                Response(endpoint=end),
            ]
        partial = speech_pb2.SpeechPartial(
            text=f"{state.position}",
            audio_processed_seconds=state.position / state.rate,
            utterance=state.utterance,
            timing=common_pb2.Timing(received_position=state.position, processed_position=state.position),
        )
        return [*responses, Response(partial=partial)]

    def _final(self, state: State, cut: int, reason: str) -> speech_pb2.SpeechFinal:
        spoken, state.rest = state.rest[:cut], state.rest[cut:]
        end = (state.position - len(state.rest) // state.width) / state.rate
        start = end - cut // state.width / state.rate
        text = checksum(spoken)
        final = speech_pb2.SpeechFinal(
            text=text,
            words=[speech_pb2.Word(text=text, start_seconds=start, end_seconds=end, confidence=0.5)],
            start_seconds=start,
            end_seconds=end,
            utterance=state.utterance,
            reason=speech_pb2.UtteranceEndReason.Value(f"UTTERANCE_END_REASON_{reason}"),
            timing=common_pb2.Timing(
                received_position=state.position, processed_position=state.position, processing_seconds=0.002
            ),
        )
        state.utterance += 1
        return final

    def _checkpoint(self, state: State, request_id: str = "") -> common_pb2.Checkpoint:
        return common_pb2.Checkpoint(data=state.dump(), position=state.position, request_id=request_id)

    async def _invalid(self, context: Any, name: str, description: str) -> NoReturn:
        violation = error_details_pb2.BadRequest.FieldViolation(field=name, description=description)
        bad_request = error_details_pb2.BadRequest(field_violations=[violation])
        await self._abort(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid request", bad_request)

    async def _abort(self, context: Any, code: grpc.StatusCode, message: str, *details: Message) -> NoReturn:
        await context.abort(code, message, rich_status(code, message, *details))
        raise AssertionError("abort returns never")

    async def ListModels(self, request: Any, context: Any) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=[models_pb2.Model(name="scripted", engine="ancat")])

    async def DescribeModel(self, request: Any, context: Any) -> models_pb2.DescribeModelResponse:
        if request.name != "scripted":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        return models_pb2.DescribeModelResponse(model=models_pb2.Model(name="scripted"))
