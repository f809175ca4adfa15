"""A video session: prompts in, frames out (ours).

**Credit.** The server generates up to the credit and no further. By default the credit follows the
application: it covers `buffer_seconds` of video beyond the frames that were taken from the iterator, so an
application that stops reading stops the generation, and nobody has to count.

**After a lost connection** the session continues at its last checkpoint, which is behind what the application
has. The frames in between come again and are dropped. So that they are the same as before, and the
following ones fit to them, prompts are changed again at the frames at which they took effect the first time;
ones that had not taken effect yet do so no earlier than at the first frame that is new. Until the frames are
new, the credit ends where they begin to be: no H.264 fragment holds both old and new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from realtide_client import errors, video_wire
from realtide_client import types as t
from realtide_client import video_types as v
from realtide_client.link import VIDEO, Request, Target
from realtide_client.receipts import Control
from realtide_client.replay import Entry, Message, ReplayLog
from realtide_client.retry import RetryPolicy
from realtide_client.session import Session
from realtide_client.v1 import common_pb2, video_pb2


class VideoStream(Session[v.VideoEvent, v.VideoInfo]):
    """One video session. Use it as an asynchronous context manager and iterate over its events.

    Args:
        target: Where the server is.
        options: The session's choices. With `resume` those of the checkpoint hold.
        resume: A checkpoint to continue from.
        retry: When to connect again.
        open_timeout: Seconds to wait for the server's first message.
        checkpoint_interval_ms: Milliseconds of video between checkpoints; 0: none but those asked for.
        buffer_seconds: Video that may be generated ahead of what was taken; None: only `grant` gives credit.
    """

    _kind = VIDEO
    _queue = math.inf  # the credit bounds what waits, and receipts must not wait behind it

    def __init__(
        self,
        target: Target,
        options: v.VideoOptions,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
        buffer_seconds: float | None = 2.0,
    ) -> None:
        super().__init__(
            target,
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            checkpoint_interval_ms=checkpoint_interval_ms,
        )
        if buffer_seconds is not None and not 0 < buffer_seconds < math.inf:
            raise ValueError(f"buffer_seconds must be more than 0, not {buffer_seconds}")
        self._options = video_wire.options_message(options)
        self._model = options.model
        self._buffer_seconds = buffer_seconds
        self._received = 0  # frames up to here have come
        self._consumed = 0  # frames up to here were taken
        self._granted = 0  # by `grant`
        self._credit = 0  # that the present connection was given
        self._last_credit: int | None = None  # once the input is finished
        self._next = 0  # frame that the present connection sends next
        self._goal = 0  # where the present connection begins to send what is new
        self._sent: set[str] = set()  # controls that some connection was given
        self._effects: dict[str, int] = {}  # frames at which controls took effect
        self._prompts: set[str] = set()  # control ids whose PromptApplied has been told
        self._initialization = b""  # the one that was told
        self._pending = b""  # the one of the present connection, until it is told

    @property
    def position(self) -> int:
        """Index after the last frame that was taken."""
        self.info  # noqa: B018  raises if the stream was never opened
        return self._consumed

    @property
    def received(self) -> int:
        """Index after the last frame that has arrived here."""
        self.info  # noqa: B018  raises if the stream was never opened
        return self._received

    # Input

    async def set_prompt(self, prompt: str, at_frame: int | None = None) -> Control:
        """Change the prompt.

        The control's `applied` receipt and a `PromptApplied` event say with which frame it took effect.

        Args:
            prompt: The new prompt.
            at_frame: It takes effect with the first block of frames that begins here or later; None: with
                the next block that is not begun yet.

        Raises:
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream.
        """
        action = video_pb2.SetPrompt(prompt=prompt, at_frame=at_frame)
        return self._control(lambda i: video_pb2.VideoControl(control_id=i, set_prompt=action))

    async def pause(self) -> Control:
        """Stop sending and generating at once; frames that are on their way still come."""
        return self._control(lambda i: video_pb2.VideoControl(control_id=i, pause=video_pb2.PausePlayback()))

    async def resume(self) -> Control:
        """Go on after a pause."""
        return self._control(
            lambda i: video_pb2.VideoControl(control_id=i, resume_playback=video_pb2.ResumePlayback())
        )

    async def grant(self, position: int) -> None:
        """Take frames below `position`, besides those of the automatic credit; lower than before: no effect.

        Raises:
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream; InvalidRequest if the position is more than
                `info.max_credit_frames` ahead of the frames sent.
        """
        self._check_input()
        self._granted = max(self._granted, position)
        self._to_send.set()

    async def finish(self) -> None:
        """End the input: the frames that the credit covers follow, then iteration ends. Idempotent."""
        await super().finish()
        if self._last_credit is None:
            self._last_credit = max(self._credit, self._wanted())

    # What is video's own of the session

    def _opening(self) -> Request:
        # The first block is begun with one frame of credit; how many more depends on the rate, which the
        # server may be the one to choose.
        credit = 0 if self._buffer_seconds is None else 1
        return video_wire.open_request(self._options, self._model, self._interval_ms, credit)

    def _begin(self, opened: Any) -> tuple[v.VideoInfo, ReplayLog]:
        self._received = self._consumed = opened.session.position
        if self._checkpoint is None:
            # Should the session have to begin anew before its first checkpoint, then with the same choices.
            for name in ("width", "height", "frames_per_second", "seed"):
                setattr(self._options, name, getattr(opened.options, name))
            self._model = opened.session.model
        return self._adopt_opened(opened), ReplayLog(1, 0)

    def _continue(self, opened: Any) -> v.VideoInfo:
        position = opened.session.position
        if position > self._received:
            raise errors.StreamLost(
                f"the server continues at frame {position}, but frames from {self._received} on have not come"
            )
        self._buffer.rewind(0)
        return self._adopt_opened(opened)

    def _adopt_opened(self, opened: Any) -> v.VideoInfo:
        self._pending = b""
        self._credit = opened.credit
        self._goal = self._received
        self._next = opened.session.position  # of this connection
        return video_wire.video_info(opened)

    def _requests(self, entry: Entry) -> Sequence[Request]:
        if not isinstance(entry, Message):
            raise TypeError("a video session sends no media")
        again = self._next < self._goal or entry.key in self._sent
        self._sent.add(entry.key)
        request = entry.request
        if again and isinstance(request, video_pb2.VideoStreamRequest) and request.HasField("control"):
            request = _copy(request)
            if request.control.HasField("set_prompt"):
                change = request.control.set_prompt
                change.at_frame = self._effects.get(entry.key, max(change.at_frame, self._goal))
        return [request]

    def _extra(self) -> Request | None:
        """Credit that is due."""
        target, most = self._wanted(), self.info.max_credit_frames
        if self._next < self._goal:
            target = min(self._goal, self._next + most) if most else self._goal
        elif target - self._credit < self._stride() and self._next < self._credit and not self._finishing:
            return None  # a message for every frame would be too many
        if target <= self._credit:
            return None
        self._credit = target
        return video_pb2.VideoStreamRequest(credit=common_pb2.Credit(position=target))

    def _may_finish(self) -> bool:
        return self._next >= self._goal

    def _complete(self) -> bool:
        length = self._info.length_frames if self._info is not None else None
        ends = [end for end in (length, self._last_credit) if end is not None]
        return bool(ends) and self._received >= min(ends)

    def _wanted(self) -> int:
        """The credit that the application's reading asks for."""
        if self._last_credit is not None:
            return self._last_credit
        target = self._granted
        if self._buffer_seconds is not None:
            target = max(target, self._consumed + self._window())
        length = self.info.length_frames
        return target if length is None else min(target, length)

    def _window(self) -> int:
        info = self.info
        frames = max(1, math.ceil((self._buffer_seconds or 0.0) * info.frames_per_second))
        return min(frames, info.max_credit_frames or frames)

    def _stride(self) -> int:
        return max(1, self._window() // 4) if self._buffer_seconds is not None else 1

    def _on_applied(self, control_id: str, position: int) -> None:
        self._effects.setdefault(control_id, position)

    def _cover(self, checkpoint: t.Checkpoint) -> None:
        self._buffer.cover(0)

    def _taken(self, item: v.VideoEvent) -> None:
        if isinstance(item, v.Frames):
            self._consumed = item.end
            self._to_send.set()

    def _item(self, response: Any, arrived: float) -> v.VideoEvent | None:
        match response.WhichOneof("message"):
            case "frames":
                return self._frames(response.frames, arrived)
            case "prompt_applied":
                event = video_wire.prompt_applied(response.prompt_applied, arrived)
                if event.control_id in self._prompts or event.first_frame < self._received:
                    return None
                self._prompts.add(event.control_id)
                return event
        return None

    def _frames(self, message: video_pb2.VideoFrames, arrived: float) -> v.Frames | None:
        if message.position != self._next:
            raise errors.ServerError(f"frame {message.position} came where frame {self._next} was due")
        self._next += message.count
        self._pending = message.initialization or self._pending
        if self._next <= self._goal:
            self._to_send.set()  # the credit goes on from here
            return None
        if message.position < self._goal:
            raise errors.ServerError(f"frames up to {self._next} came with a credit of {self._goal}")
        self._received = self._next
        initialization = b"" if self._pending == self._initialization else self._pending
        self._initialization, self._pending = self._pending or self._initialization, b""
        return video_wire.frames(message, initialization, self.info, arrived)


def _copy(request: video_pb2.VideoStreamRequest) -> video_pb2.VideoStreamRequest:
    copy = video_pb2.VideoStreamRequest()
    copy.CopyFrom(request)
    return copy
