"""The same client without asyncio: every session runs on the event loop of one background thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from realtide_client import client, errors, image, receipts, session, stream, video
from realtide_client import image_types as i
from realtide_client import types as t
from realtide_client import video_types as v
from realtide_client.audio import Samples
from realtide_client.link import Metadata
from realtide_client.v1 import models_pb2

T = TypeVar("T")
Item = TypeVar("Item")
Info = TypeVar("Info")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="realtide-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    @property
    def running(self) -> bool:
        """False once closed."""
        return self._thread.is_alive()

    def wait(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run `work` on the loop and wait for its result; an interrupted wait (Ctrl-C) cancels the work.

        Raises:
            TimeoutError: It took longer than `timeout` seconds.
            StreamClosed: The client has been closed.
        """
        if not self._thread.is_alive():
            work.close()
            raise errors.StreamClosed("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Control:
    """A control on its way; see `realtide_client.Control`."""

    def __init__(self, loop: _Loop, control: receipts.Control) -> None:
        self._loop = loop
        self._control = control
        self.control_id = control.control_id

    def accepted(self, timeout: float | None = None) -> t.Accepted:
        """Wait until the server has validated it."""
        return self._loop.wait(self._control.accepted(), timeout)

    def applied(self, timeout: float | None = None) -> t.Applied:
        """Wait until it has taken effect."""
        return self._loop.wait(self._control.applied(), timeout)


class _Stream(Generic[Item, Info]):
    """What the sessions of all kinds have."""

    def __init__(self, loop: _Loop, inner: session.Session[Item, Info]) -> None:
        self._loop = loop
        self._session = inner

    def open(self) -> Info:
        """Connect and wait until the session is open. Raises RealtideError."""
        return self._loop.wait(self._session.open())

    def __enter__(self) -> Self:
        self._loop.wait(self._session.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the session unless it has ended. Idempotent."""
        self._loop.wait(self._session.close())

    @property
    def info(self) -> Info:
        """What was negotiated."""
        return self._session.info

    @property
    def reconnects(self) -> int:
        """How often the connection has been replaced."""
        return self._session.reconnects

    @property
    def last_checkpoint(self) -> t.Checkpoint | None:
        """The newest checkpoint, asked for or not."""
        return self._session.last_checkpoint

    def checkpoint(self, timeout: float | None = None) -> t.Checkpoint:
        """Ask for the session's state and wait for it."""
        return self._loop.wait(self._session.checkpoint(), timeout)

    def finish(self) -> None:
        """End the input; what remains follows."""
        self._loop.wait(self._session.finish())

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        try:
            return self._loop.wait(self._next())
        except StopAsyncIteration:
            raise StopIteration from None

    async def _next(self) -> Item:
        return await self._session.__anext__()

    def _control(self, work: Coroutine[Any, Any, receipts.Control]) -> Control:
        return Control(self._loop, self._loop.wait(work))


class SpeechStream(_Stream[t.Result, t.SessionInfo]):
    """A speech session; see `realtide_client.SpeechStream`. Its methods may be called from any thread.

    Usually one thread sends while another one iterates over the results.
    """

    def __init__(self, loop: _Loop, inner: stream.SpeechStream) -> None:
        super().__init__(loop, inner)
        self._inner = inner

    @property
    def position(self) -> int:
        """Index of the next sample that `send` will take."""
        return self._inner.position

    def send(self, samples: Samples) -> None:
        """Send mono audio. Raises ValueError, StreamClosed, RealtideError."""
        self._loop.wait(self._inner.send(samples))

    def set_lookahead(self, *, bias: float | None = None, max_lookahead_ms: int | None = None) -> Control:
        """Turn the lookahead dial; a cap of 0 is causal, -1 removes it."""
        return self._control(self._inner.set_lookahead(bias=bias, max_lookahead_ms=max_lookahead_ms))

    def set_interim_results(self, enabled: bool) -> Control:
        """Turn partials on or off."""
        return self._control(self._inner.set_interim_results(enabled))

    def set_endpointing(self, rules: t.EndpointingRules) -> Control:
        """Replace all endpointing rules."""
        return self._control(self._inner.set_endpointing(rules))

    def set_phrase_boosts(self, boosts: tuple[t.PhraseBoost, ...]) -> Control:
        """Replace the phrases to favour."""
        return self._control(self._inner.set_phrase_boosts(boosts))

    def flush(self) -> Control:
        """Cut the utterance now."""
        return self._control(self._inner.flush())

    def sent_at(self, seconds: float) -> float | None:
        """When the audio at `seconds` was given to `send`, on `time.monotonic()`."""
        return self._inner.sent_at(seconds)


class VideoStream(_Stream[v.VideoEvent, v.VideoInfo]):
    """A video session; see `realtide_client.VideoStream`. Its methods may be called from any thread.

    Usually one thread iterates while another one changes prompts.
    """

    def __init__(self, loop: _Loop, inner: video.VideoStream) -> None:
        super().__init__(loop, inner)
        self._inner = inner

    @property
    def position(self) -> int:
        """Index after the last frame that was taken."""
        return self._inner.position

    @property
    def received(self) -> int:
        """Index after the last frame that has arrived here."""
        return self._inner.received

    def set_prompt(self, prompt: str, at_frame: int | None = None) -> Control:
        """Change the prompt with the first block that begins at `at_frame` or later; None: the next one."""
        return self._control(self._inner.set_prompt(prompt, at_frame))

    def pause(self) -> Control:
        """Stop sending and generating at once."""
        return self._control(self._inner.pause())

    def resume(self) -> Control:
        """Go on after a pause."""
        return self._control(self._inner.resume())

    def grant(self, position: int) -> None:
        """Take frames below `position`, besides those of the automatic credit."""
        self._loop.wait(self._inner.grant(position))


class ImageStream(_Stream[i.ImageEvent, i.ImageInfo]):
    """An image session; see `realtide_client.ImageStream`. Its methods may be called from any thread."""

    def __init__(self, loop: _Loop, inner: image.ImageStream) -> None:
        super().__init__(loop, inner)
        self._inner = inner

    def condition(self, kind: str, data: bytes) -> i.Condition:
        """Give the server an image to guide others."""
        return self._loop.wait(self._inner.condition(kind, data))

    def generate(self, prompt: str, **choices: Any) -> Control:
        """Ask for an image; takes what `realtide_client.ImageStream.generate` takes."""
        return self._control(self._inner.generate(prompt, **choices))

    def cancel(self, request: Control) -> Control:
        """Call an image off."""
        return self._control(self._inner.cancel(request._control))


class Client:
    """A server; see `realtide_client.Client`. Close it to stop its thread."""

    def __init__(self, inner: client.Client) -> None:
        self._inner = inner
        self._loop = _Loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and thread. Sessions must be closed before. Idempotent."""
        if self._loop.running:
            self._loop.wait(self._inner.close())
            self._loop.close()

    def speech(self, options: t.SpeechOptions | None = None, **choices: Any) -> SpeechStream:
        """A speech session, to be used with `with`; takes what `realtide_client.Client.speech` takes."""
        return SpeechStream(self._loop, self._inner.speech(options, **choices))

    def video(self, options: v.VideoOptions | None = None, **choices: Any) -> VideoStream:
        """A video session, to be used with `with`; takes what `realtide_client.Client.video` takes."""
        return VideoStream(self._loop, self._inner.video(options, **choices))

    def image(self, options: i.ImageOptions | None = None, **choices: Any) -> ImageStream:
        """An image session, to be used with `with`; takes what `realtide_client.Client.image` takes."""
        return ImageStream(self._loop, self._inner.image(options, **choices))

    def models(self, timeout: float = 10.0) -> list[models_pb2.Model]:
        """Every model of the server. Raises RealtideError."""
        return self._loop.wait(self._inner.models(timeout))

    def describe(self, name: str, timeout: float = 10.0) -> models_pb2.Model:
        """One model. Raises NotFound, RealtideError."""
        return self._loop.wait(self._inner.describe(name, timeout))


def connect(
    address: str,
    *,
    tls: bool = False,
    root_certificates: bytes | None = None,
    client_key: bytes | None = None,
    client_certificate: bytes | None = None,
    api_key: str | None = None,
    metadata: Metadata = (),
    channel_options: Sequence[tuple[str, str | int]] = (),
) -> Client:
    """A client of the server at `address`; the arguments are those of `realtide_client.connect`."""
    return Client(
        client.connect(
            address,
            tls=tls,
            root_certificates=root_certificates,
            client_key=client_key,
            client_certificate=client_certificate,
            api_key=api_key,
            metadata=metadata,
            channel_options=channel_options,
        )
    )
