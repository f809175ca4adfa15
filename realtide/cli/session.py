"""One transcription: audio in at its pace, results out to a display, and what is worth knowing at the end."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from realtide.cli.audio import Samples, Source
from realtide.cli.display import Display
from realtide_client import Client, Endpoint, Final, Partial, SpeechOptions, SpeechStream


@dataclass(slots=True)
class Summary:
    """Figures of a transcription. Delays are in seconds, and known only if audio came at the pace of speech.

    Attributes:
        first_partial: From the audio of the first word's start to the first partial with text.
        final_delays: Of each utterance with words, from the end of its last word to its final.
        lookahead_ms: Mean lookahead of each utterance, in milliseconds.
        texts: Texts of the utterances that have any.
        seconds: Audio sent.
        reconnects: How often the connection was replaced.
    """

    first_partial: float | None = None
    final_delays: list[float] = field(default_factory=list)
    lookahead_ms: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reconnects: int = 0

    def sentence(self) -> str:
        """The figures on one line."""
        parts = [f"{self.seconds:.1f} s of audio"]
        if self.first_partial is not None:
            parts.append(f"first partial after {self.first_partial * 1000:.0f} ms")
        if self.final_delays:
            parts.append(f"finals after {statistics.mean(self.final_delays) * 1000:.0f} ms")
        if self.lookahead_ms:
            parts.append(f"mean lookahead {statistics.mean(self.lookahead_ms):.0f} ms")
        if self.reconnects:
            parts.append(f"{self.reconnects} reconnections")
        return ", ".join(parts)


async def transcribe(
    client: Client,
    source: Source,
    options: SpeechOptions,
    display: Display,
    *,
    pace: bool,
    stop: asyncio.Event | None = None,
) -> Summary:
    """Send all audio of `source` and show every result.

    Args:
        client: The server.
        source: The audio.
        options: The session's choices; the sample rate is the source's.
        display: Where results go.
        pace: Send a block when its last sample would have been spoken.
        stop: Once set, no more audio is sent and what was sent is finished.

    Raises:
        RealtideError: The session failed.
        CommandError: The audio is damaged.
    """
    summary = Summary()
    timed = pace or source.live
    async with client.speech(options, sample_rate=source.sample_rate) as stream:
        sender = asyncio.create_task(_send(stream, source, display, summary, pace, stop))
        receiver = asyncio.create_task(_receive(stream, display, summary, timed))
        try:
            await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (receiver, sender):
                if task.done():
                    task.result()
        finally:
            sender.cancel()
            receiver.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)
        summary.reconnects = stream.reconnects
    return summary


async def _send(
    stream: SpeechStream,
    source: Source,
    display: Display,
    summary: Summary,
    pace: bool,
    stop: asyncio.Event | None,
) -> None:
    start = time.monotonic()
    sent = 0
    async for block in _until(source.blocks, stop or asyncio.Event()):
        sent += len(block)
        if pace:
            await asyncio.sleep(start + sent / source.sample_rate - time.monotonic())
        await stream.send(block)
        summary.seconds = sent / source.sample_rate
        display.sent(summary.seconds)
    await stream.finish()


async def _until(blocks: AsyncIterator[Samples], stop: asyncio.Event) -> AsyncIterator[Samples]:
    """The blocks until `stop` is set, also while the next one is waited for."""
    stopped = asyncio.ensure_future(stop.wait())
    following: asyncio.Future[Samples | None] | None = None
    try:
        while not stopped.done():
            following = asyncio.ensure_future(_next(blocks))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            block = following.result()
            if block is None:
                return
            yield block
    finally:
        stopped.cancel()
        if following is not None:
            following.cancel()


async def _next(blocks: AsyncIterator[Samples]) -> Samples | None:
    return await anext(blocks, None)


async def _receive(stream: SpeechStream, display: Display, summary: Summary, timed: bool) -> None:
    async for result in stream:
        if isinstance(result, Endpoint):
            continue
        delay = None
        if timed and result.words:
            delay = delay_of(stream, result, result.words[-1].end)
            if summary.first_partial is None:
                summary.first_partial = delay_of(stream, result, result.words[0].start)
        if isinstance(result, Partial):
            display.partial(result, delay)
            continue
        if result.words:
            summary.lookahead_ms.append(result.lookahead_mean_ms)
            if delay is not None:
                summary.final_delays.append(delay)
        if result.text:
            summary.texts.append(result.text)
        display.final(result, delay)


def delay_of(stream: SpeechStream, result: Partial | Final, at: float) -> float | None:
    """Seconds from the sending of the audio at `at` seconds to the arrival of `result`; None if not known."""
    sent = stream.sent_at(at)
    return None if sent is None else result.timing.arrived_at - sent
