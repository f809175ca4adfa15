"""A speech session: audio in, results out (ours)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from realtide_client import types as t
from realtide_client import wire
from realtide_client.audio import Samples, encode, sample_bytes
from realtide_client.link import SPEECH, Request, Target
from realtide_client.progress import Progress
from realtide_client.receipts import Control as Control
from realtide_client.replay import Audio, Entry, ReplayLog
from realtide_client.retry import RetryPolicy
from realtide_client.session import Session
from realtide_client.v1 import common_pb2, speech_pb2

_CHUNK_BYTES = 64 << 10  # larger pieces of audio travel as several messages
_ENVELOPE_BYTES = 64  # room for what a message holds besides its samples


class SpeechStream(Session[t.Result, t.SessionInfo]):
    """One speech session. Use it as an asynchronous context manager and iterate over its results.

    Results must be read: when many wait, the stream stops reading, and the server slows the session.

    Args:
        target: Where the server is.
        options: The session's choices. With `resume` only `encoding` and `sample_rate` of the checkpoint
            count, and they are taken from the server's answer.
        resume: A checkpoint to continue from.
        retry: When to connect again.
        open_timeout: Seconds to wait for the server's first message.
        checkpoint_interval_ms: Milliseconds of audio between checkpoints; 0: none but those asked for.
        replay_seconds: Most audio kept for being sent again.
        send_ahead_seconds: Audio that may wait for being sent before `send` waits.
    """

    _kind = SPEECH

    def __init__(
        self,
        target: Target,
        options: t.SpeechOptions,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
        replay_seconds: float = 60.0,
        send_ahead_seconds: float = 10.0,
    ) -> None:
        super().__init__(
            target,
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            checkpoint_interval_ms=checkpoint_interval_ms,
        )
        self._options = options
        self._replay_seconds = replay_seconds if self._retry.max_retries else 0.0
        self._send_ahead_seconds = send_ahead_seconds
        self._progress = Progress()
        self._sent_times: deque[tuple[int, float]] = deque(maxlen=20_000)

    @property
    def position(self) -> int:
        """Index of the next sample that `send` will take."""
        return self._buffer.end

    # Input

    async def send(self, samples: Samples) -> None:
        """Send mono audio that follows what was sent before; waits while too much waits to be sent.

        Args:
            samples: int16 or float arrays of shape [n], converted to the session's encoding; or bytes in it.

        Raises:
            ValueError: The samples are not mono, finite and whole.
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream.
        """
        self._check_input()
        data = encode(samples, self.info.encoding)
        if not data:
            return
        limit = self._send_ahead_seconds * self.info.sample_rate
        while self._buffer.unsent_samples > limit:
            self._send_room.clear()
            await self._send_room.wait()
            self._check_input()
        self._buffer.append_audio(data)
        self._sent_times.append((self._buffer.end, time.monotonic()))
        self._to_send.set()

    async def set_lookahead(
        self, *, bias: float | None = None, max_lookahead_ms: int | None = None
    ) -> Control:
        """Turn the lookahead dial. None leaves a value as it is; a cap of 0 is causal, -1 removes it."""
        action = speech_pb2.SetLookahead(bias=bias, max_lookahead_ms=max_lookahead_ms)
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_lookahead=action))

    async def set_interim_results(self, enabled: bool) -> Control:
        """Turn partials on or off."""
        action = speech_pb2.SetInterimResults(enabled=enabled)
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_interim_results=action))

    async def set_endpointing(self, rules: t.EndpointingRules) -> Control:
        """Replace all endpointing rules; None takes the server's default, not the value before."""
        action = speech_pb2.SetEndpointing(rules=wire.rules_message(rules))
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_endpointing=action))

    async def set_phrase_boosts(self, boosts: tuple[t.PhraseBoost, ...]) -> Control:
        """Replace the phrases to favour."""
        action = speech_pb2.SetPhraseBoosts(boosts=wire.boost_messages(boosts))
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_phrase_boosts=action))

    async def flush(self) -> Control:
        """Cut the utterance now; its final follows and the session goes on."""
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, flush=common_pb2.Flush()))

    # Output

    def sent_at(self, seconds: float) -> float | None:
        """When the audio at `seconds` was given to `send`, on `time.monotonic()`; None if that is not known.

        With `Word.end` and `Timing.arrived_at` this is all that is needed for the emission delay of a word.
        """
        sample = seconds * self.info.sample_rate
        found: float | None = None
        for end, when in reversed(self._sent_times):
            if end < sample:
                break
            found = when
        return found

    # What is speech's own of the session

    def _opening(self) -> Request:
        return wire.open_request(self._options, self._interval_ms)

    def _begin(self, opened: Any) -> tuple[t.SessionInfo, ReplayLog]:
        info = wire.session_info(opened)
        width = sample_bytes(info.encoding)
        keep = int(self._replay_seconds * info.sample_rate) * width
        return info, ReplayLog(width, keep, start=opened.session.position)

    def _continue(self, opened: Any) -> t.SessionInfo:
        self._buffer.rewind(opened.session.position)
        return wire.session_info(opened)

    def _requests(self, entry: Entry) -> Sequence[Request]:
        """Audio in pieces that the server takes, each with its position."""
        if not isinstance(entry, Audio):
            return [entry.request]
        room = max(self.info.max_message_bytes or _CHUNK_BYTES, 2 * _ENVELOPE_BYTES)
        width = sample_bytes(self.info.encoding)
        step = min(_CHUNK_BYTES, room - _ENVELOPE_BYTES) // width * width
        return [
            speech_pb2.SpeechStreamRequest(
                audio=speech_pb2.AudioChunk(
                    data=entry.data[offset : offset + step], position=entry.position + offset // width
                )
            )
            for offset in range(0, len(entry.data), step)
        ]

    def _item(self, response: Any, arrived: float) -> t.Result | None:
        match response.WhichOneof("message"):
            case "partial":
                return wire.partial(response.partial, arrived)
            case "final":
                return wire.final(response.final, arrived)
            case "endpoint":
                return wire.endpoint(response.endpoint, arrived)
        return None

    def _is_new(self, item: t.Result) -> bool:
        return self._progress.is_new(item)
