"""Speech.Stream: audio in, words out, in the grammar of sessions.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message

from realtide.engines.ancat import types
from realtide.engines.engine import Opening, Restoring
from realtide.server import checkpoint
from realtide.server.audio import decode, pieces
from realtide.server.host import Host
from realtide.server.models import SpeechModel, of_checkpoint, select
from realtide.server.sessions import Plan, StreamSession, checkpoint_interval, new_session_id
from realtide.server.speech_fields import Fields, engine_options
from realtide.server.speech_meter import SpeechMeter
from realtide.server.status import invalid, misfit
from realtide_client.v1 import common_pb2, speech_pb2_grpc
from realtide_client.v1 import speech_pb2 as pb

SERVICE = "realtide.v1.Speech"

# One message is fed to the engine in pieces of this length, in seconds, so that pushing it cannot hold up a
# step.
_PIECE = 0.1
# Audio this much ahead of the clock, in seconds, still counts as live: jitter, and clocks that differ a
# little.
_JITTER = 1.0

_REASONS = {
    "endpoint": pb.UTTERANCE_END_REASON_ENDPOINT,
    "no_speech": pb.UTTERANCE_END_REASON_NO_SPEECH,
    "max_length": pb.UTTERANCE_END_REASON_MAX_LENGTH,
    "flush": pb.UTTERANCE_END_REASON_FLUSH,
    "finish": pb.UTTERANCE_END_REASON_FINISH,
}
_KINDS = {
    "speech_start": pb.ENDPOINT_KIND_SPEECH_START,
    "end_likely": pb.ENDPOINT_KIND_END_LIKELY,
    "end": pb.ENDPOINT_KIND_END,
}


class SpeechService(speech_pb2_grpc.SpeechServicer):
    """The gRPC service."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def Stream(  # type: ignore[override]  # the stubs know only generators, grpc coroutines too
        self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One session."""
        await SpeechSession(self._host, context).run()


class SpeechSession(StreamSession):
    """One speech session; positions are samples at the client's rate."""

    service: ClassVar[str] = SERVICE
    response: ClassVar[Callable[..., Message]] = pb.SpeechStreamResponse

    def __init__(self, host: Host, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        super().__init__(host, context)
        self._audio = pb.AudioFormat()
        self._options = pb.SpeechOptions()
        self._interval = 0
        self._started: float | None = None

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self._audio.sample_rate_hz

    # -- opening -----------------------------------------------------------------------------------------

    def plan_open(self, message: pb.SpeechOpen) -> Plan:
        """Check every choice of the session."""
        model = select(self.host.models, SpeechModel, message.session.model, "open.session.model")
        fields = Fields(model.info, self.config)
        fields.audio(message.audio, "open.audio")
        interval = checkpoint_interval(message.session, self.config, "open.session")
        self._audio = message.audio
        self._options = fields.options(message.options, "open.options")
        options = engine_options(self._audio, self._options)
        self._interval = interval
        return self._plan_for(model, Opening(options), None)

    def plan_resume(self, header: checkpoint.Header, state: bytes) -> Plan:
        """Everything is as the checkpoint says; the seal vouches for it."""
        setup = pb.SpeechOpened()
        try:
            setup.ParseFromString(header.setup)
        except DecodeError:
            raise misfit("damaged setup") from None
        model = of_checkpoint(self.host.models, SpeechModel, header.model)
        fields = Fields(model.info, self.config)
        fields.audio(setup.audio, "resume.checkpoint")
        self._audio, self._options = setup.audio, setup.options
        options = engine_options(self._audio, self._options)
        self._interval = setup.session.checkpoint_interval_ms
        return self._plan_for(model, Restoring(state, options), header)

    def _plan_for(
        self, model: SpeechModel, make: Callable[[Any], Any], resumed: checkpoint.Header | None
    ) -> Plan:
        start = 0 if resumed is None else resumed.position
        self._fields = Fields(model.info, self.config)
        self._meter = SpeechMeter(self.host.metrics, model.metrics, self.rate, start)
        return Plan(
            model=model,
            make=make,
            session_id=new_session_id() if resumed is None else resumed.session_id,
            start=start,
            resumed=resumed is not None,
            checkpoint_interval=self._interval,
        )

    def opened(self, common: common_pb2.Opened) -> Message:
        """The server's first message."""
        return pb.SpeechOpened(
            session=common,
            audio=self._audio,
            options=self._options,
            limits=self._fields.limits(),
            frame_seconds=self._fields.info.frame_seconds,
        )

    def setup(self) -> bytes:
        """Audio and the options in force."""
        session = common_pb2.Opened(checkpoint_interval_ms=self._interval)
        return pb.SpeechOpened(session=session, audio=self._audio, options=self._options).SerializeToString()

    # -- input -------------------------------------------------------------------------------------------

    async def on_media(self, request: pb.SpeechStreamRequest) -> None:
        """Check, decode and queue audio."""
        now = time.monotonic()
        chunk = request.audio
        if chunk.HasField("position") and chunk.position != self.received:
            raise invalid("audio.position", f"{chunk.position}, must be {self.received}: audio has no gaps")
        samples = decode(chunk.data, self._audio.encoding)
        size = max(round(_PIECE * self.rate), 1)
        position = self.received
        if self._started is None:
            # The clock that the stream's audio is measured against: a first chunk of usual length is live.
            self._started = now - (position + min(len(samples), size)) / self.rate
        self.received += len(samples)
        self._meter.audio(self.received, now)
        for piece in pieces(samples, size):
            position += len(piece)
            # What is far ahead of real time is urgent only when it would be due: it uses what live sessions
            # leave over.
            due = max(now, self._started + position / self.rate - _JITTER)
            await self.put(types.Audio(piece, due), len(piece), len(piece) / self.rate)

    def on_control(self, control: pb.SpeechControl) -> tuple[Any, Callable[[], None]]:
        """Check and translate a control."""
        return self._fields.control(control, self._options)

    def finish_item(self) -> Any:
        """The engine's end of input."""
        return types.Finish()

    def on_close(self, busy: float) -> None:
        """Record the session's real-time factor."""
        self._meter.close(busy)

    # -- results -----------------------------------------------------------------------------------------

    def on_event(self, event: types.SpeechEvent, position: int) -> Iterable[Message]:
        """Translate an event and take its measure."""
        if isinstance(event, types.Applied):
            return self.applied(event.control_id, event.position)
        if isinstance(event, types.Partial):
            self._processed(event.audio_processed)
            self._meter.partial(event)
            return [pb.SpeechStreamResponse(partial=self._partial(event, position))]
        if isinstance(event, types.Final):
            self._processed(event.audio_processed)
            self._meter.final(event)
            return [pb.SpeechStreamResponse(final=self._final(event, position))]
        self._processed(event.at)
        self._meter.endpoint(event)
        endpoint = pb.EndpointEvent(
            kind=_KINDS[event.kind],
            at_seconds=event.at,
            utterance=event.utterance,
            timing=self._timing(position),
        )
        return [pb.SpeechStreamResponse(endpoint=endpoint)]

    def _processed(self, seconds: float) -> None:
        self.processed = min(max(self.processed, round(seconds * self.rate)), self.received)

    def _timing(self, position: int) -> common_pb2.Timing:
        return self.timing(self._meter.arrival(position))

    def _words(self, words: Iterable[types.Word]) -> list[pb.Word]:
        if not self._options.word_times:
            return []
        return [
            pb.Word(
                text=word.text,
                start_seconds=word.start,
                end_seconds=word.end,
                confidence=word.confidence,
                lookahead_ms=word.lookahead * 1000,
            )
            for word in words
        ]

    def _partial(self, event: types.Partial, position: int) -> pb.SpeechPartial:
        return pb.SpeechPartial(
            text=event.text,
            words=self._words(event.words),
            stability=event.stability,
            audio_processed_seconds=event.audio_processed,
            lookahead_mean_ms=event.lookahead_mean * 1000,
            utterance=event.utterance,
            end_likely=event.end_likely,
            timing=self._timing(position),
        )

    def _final(self, event: types.Final, position: int) -> pb.SpeechFinal:
        most = self._options.max_alternatives
        return pb.SpeechFinal(
            text=event.text,
            words=self._words(event.words),
            confidence=event.confidence,
            start_seconds=event.start,
            end_seconds=event.end,
            speech_end_seconds=event.speech_end,
            audio_processed_seconds=event.audio_processed,
            lookahead_mean_ms=event.lookahead_mean * 1000,
            lookahead_p90_ms=event.lookahead_p90 * 1000,
            utterance=event.utterance,
            reason=_REASONS[event.reason],
            alternatives=[
                pb.Alternative(text=text, log_probability=score)
                for text, score in (event.alternatives[:most] if most > 1 else ())
            ],
            timing=self._timing(position),
        )
