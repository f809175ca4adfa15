"""One video: prompts in at their frames, frames out to a sink and a display, figures at the end (ours)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from realtide.cli.video_out import Sink
from realtide_client import Client, Control, Frames, PromptApplied, VideoInfo, VideoOptions, VideoStream

_AHEAD = 8  # planned changes of the prompt on their way; servers take at least 16


@dataclass(slots=True)
class Switch:
    """A change of the prompt that a frame has shown.

    Attributes:
        prompt: The new prompt.
        first_frame: Index of the first frame that it concerns.
        recache_seconds: What making the cache follow it took on the server.
        after_frame_before: Seconds between the arrivals of the frame before and of that first one.
        after_request: Seconds from asking for it to that frame's arrival; None if it was planned for a frame.
    """

    prompt: str
    first_frame: int
    recache_seconds: float
    after_frame_before: float | None
    after_request: float | None


@dataclass(slots=True)
class Summary:
    """Figures of a video as its client saw them; times are in seconds.

    Attributes:
        frames: Frames that came.
        seconds: From asking for the session to the last frame.
        first_frame: From asking for the session to the first frame.
        delivered: Frames per second between the first and the last arrival; None with less than two.
        decoded: Likewise, of the frames that the server had decoded.
        switches: Changes of the prompt that were seen.
        late: Frames that came after they were to be played (paced only).
        reconnects: How often the connection was replaced.
        first_prompt: The prompt of the open.
    """

    frames: int = 0
    seconds: float = 0.0
    first_frame: float | None = None
    delivered: float | None = None
    decoded: float | None = None
    switches: list[Switch] = field(default_factory=list)
    late: int = 0
    reconnects: int = 0
    first_prompt: str = ""

    def sentence(self) -> str:
        """The figures on one line."""
        parts = [f"{self.frames} frames"]
        if self.delivered is not None:
            parts.append(f"{self.delivered:.1f} frames/s delivered")
        if self.first_frame is not None:
            parts.append(f"first frame after {self.first_frame * 1000:.0f} ms")
        for switch in self.switches:
            waited = switch.after_request if switch.after_request is not None else switch.after_frame_before
            recache = switch.recache_seconds * 1000
            text = f"new prompt at frame {switch.first_frame}, recached in {recache:.0f} ms"
            if waited is not None:
                since = "the request" if switch.after_request is not None else "the frame before"
                text += f", seen {waited * 1000:.0f} ms after {since}"
            parts.append(text)
        if self.late:
            parts.append(f"{self.late} frames late")
        if self.reconnects:
            parts.append(f"{self.reconnects} reconnections")
        return ", ".join(parts)

    def prompts(self) -> dict[int, str]:
        """Every prompt by the first frame that it concerns."""
        return {0: self.first_prompt} | {switch.first_frame: switch.prompt for switch in self.switches}


class VideoDisplay(Protocol):
    """Shows what comes."""

    def opened(self, info: VideoInfo) -> None:
        """The session is open."""
        ...

    def prompt(self, event: PromptApplied) -> None:
        """A prompt is in force."""
        ...

    def frames(self, frames: Frames) -> None:
        """Frames have come, at the moment when they are to be seen."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""
        ...


class Commands(Protocol):
    """What somebody types while the video plays."""

    def lines(self) -> AsyncIterator[str]:
        """Lines as they are typed, to the end of the input."""
        ...

    def say(self, text: str) -> None:
        """Tell the one who types."""
        ...


async def play(
    client: Client,
    options: VideoOptions,
    changes: Sequence[tuple[int, str]],
    sink: Sink,
    display: VideoDisplay,
    *,
    pace: bool = False,
    buffer_seconds: float = 2.0,
    commands: Commands | None = None,
    stop: asyncio.Event | None = None,
) -> Summary:
    """Generate a video.

    Args:
        client: The server.
        options: The session's choices; the encoding is the sink's.
        changes: Frames and the prompts that take effect there, in ascending order.
        sink: Where frames go.
        display: What is shown.
        pace: Take frames as they would be played; otherwise as fast as they come.
        buffer_seconds: Video that may be generated ahead.
        commands: Somebody who changes prompts while it plays.
        stop: Once set, no more frames are taken.

    Raises:
        RealtideError: The session failed.
        CommandError: The output cannot be written.
    """
    began = time.monotonic()
    async with client.video(options, encoding=sink.encoding, buffer_seconds=buffer_seconds) as stream:
        sink.open(stream.info)
        display.opened(stream.info)
        player = _Player(stream, sink, display, began, pace)
        tasks = [asyncio.create_task(player.watch()), asyncio.create_task(player.plan(changes))]
        if commands is not None:
            tasks.append(asyncio.create_task(player.obey(commands)))
        ending = asyncio.create_task((stop or asyncio.Event()).wait())
        try:
            # The video's end ends everything, and so does the first failure; a plan that is done does not.
            pending: set[asyncio.Task[Any]] = {*tasks, ending}
            while not ending.done() and not tasks[0].done() and not player.quit:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (*tasks, ending):
                task.cancel()
            await asyncio.gather(*tasks, ending, return_exceptions=True)
        return player.summary()


class _Player:
    """One run of `play`."""

    def __init__(
        self, stream: VideoStream, sink: Sink, display: VideoDisplay, began: float, pace: bool
    ) -> None:
        self._stream = stream
        self._sink = sink
        self._display = display
        self._began = began
        self._pace = pace
        self._summary = Summary()
        self._asked: dict[str, float] = {}  # when prompts were asked for, by control
        self._new: PromptApplied | None = None  # a prompt whose first frame has not come yet
        self._first: Frames | None = None
        self._last: Frames | None = None
        self._start: float | None = None  # when frame 0 would have been played
        self._paused = False
        self.quit = False

    async def watch(self) -> None:
        """Take events to the video's end."""
        async for event in self._stream:
            if isinstance(event, PromptApplied):
                if event.control_id:
                    self._new = event
                else:
                    self._summary.first_prompt = event.prompt
                self._display.prompt(event)
                continue
            self._measure(event)
            if self._pace:
                await self._due(event)
            self._sink.write(event)
            self._display.frames(event)

    async def plan(self, changes: Sequence[tuple[int, str]]) -> None:
        """Ask for the planned prompts, a few ahead."""
        controls: list[Control] = []
        for frame, prompt in changes:
            if len(controls) >= _AHEAD:
                await controls.pop(0).applied()
            controls.append(await self._stream.set_prompt(prompt, at_frame=frame))

    async def obey(self, commands: Commands) -> None:
        """Do what is typed."""
        alive = asyncio.create_task(self._keep_alive())
        try:
            async for line in commands.lines():
                await self._obey(line.strip(), commands)
                if self.quit:
                    return
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)

    async def _obey(self, line: str, commands: Commands) -> None:
        info = self._stream.info
        match line:
            case "":
                pass
            case "/pause":
                await self._stream.pause()
                self._paused = True
                commands.say("paused; /resume goes on")
            case "/resume":
                await self._stream.resume()
                self._paused = False
                commands.say("")
            case "/quit":
                self.quit = True
            case _ if line.startswith("/"):
                commands.say(f"{line}: must be /pause, /resume or /quit, or a prompt")
            case _ if len(line) > info.max_prompt_characters or len(line.split()) > info.max_prompt_tokens:
                most = f"{info.max_prompt_characters} characters and {info.max_prompt_tokens} tokens"
                commands.say(f"too long: a prompt has at most {most}")
            case _:
                control = await self._stream.set_prompt(line)
                self._asked[control.control_id] = time.monotonic()
                commands.say(f"coming: {line}")

    async def _keep_alive(self) -> None:
        """Ask for checkpoints during a pause, so that the session is not taken for idle."""
        while True:
            await asyncio.sleep((self._stream.info.idle_timeout_seconds or 60.0) / 3)
            if self._paused:
                await self._stream.checkpoint()

    async def _due(self, frames: Frames) -> None:
        """Wait until the frames are to be played; who is late moves the rest of the film."""
        rate = self._stream.info.frames_per_second
        now = time.monotonic()
        if self._start is None:
            self._start = now - frames.position / rate
        ahead = self._start + frames.position / rate - now
        if ahead > 0:
            await asyncio.sleep(ahead)
        elif ahead < 0:
            self._summary.late += frames.count if -ahead > 1 / rate and not self._paused else 0
            self._start -= ahead

    def _measure(self, frames: Frames) -> None:
        arrived = frames.timing.arrived_at
        if self._new is not None:
            asked = self._asked.pop(self._new.control_id, None)
            before = None if self._last is None else arrived - self._last.timing.arrived_at
            self._summary.switches.append(
                Switch(
                    self._new.prompt,
                    self._new.first_frame,
                    self._new.recache_seconds,
                    before,
                    None if asked is None else arrived - asked,
                )
            )
            self._new = None
        self._first = self._first or frames
        self._last = frames
        self._summary.frames += frames.count

    def summary(self) -> Summary:
        """What was seen."""
        found = self._summary
        found.reconnects = self._stream.reconnects
        if self._first is None or self._last is None:
            found.seconds = time.monotonic() - self._began
            return found
        first, last = self._first, self._last
        found.first_frame = first.timing.arrived_at - self._began
        found.seconds = last.timing.arrived_at - self._began
        if (between := last.timing.arrived_at - first.timing.arrived_at) > 0:
            found.delivered = (last.end - first.end) / between
            decoded = last.timing.processed_position - first.timing.processed_position
            found.decoded = decoded / between
        return found


@contextlib.contextmanager
def closing(sink: Sink, display: VideoDisplay, written: list[str]) -> Iterator[None]:
    """Close both whatever happens; what the sink has written is added to `written`."""
    try:
        yield
    finally:
        display.close()
        written += sink.close()
