"""One live speech stream: everything it owns in one object (architecture rule 3; ours).

A session buffers audio and controls in the order in which they came and hands the engine work in encoder
frames. A control takes effect at the first encoder frame that was not complete when it arrived, so what
it changes does not depend on how the server batches steps.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from realtide.engines.ancat.backends import Rows
from realtide.engines.ancat.config import NO_CAP
from realtide.engines.ancat.decode_state import DecodeState
from realtide.engines.ancat.decoder import Decoder
from realtide.engines.ancat.frontend import Drawn, Float32, Frontend
from realtide.engines.ancat.types import (
    Applied,
    Audio,
    Finish,
    Flush,
    SetBoosts,
    SetEndpointing,
    SetInterim,
    SetLookahead,
    SpeechEvent,
    SpeechInput,
    SpeechOptions,
)
from realtide.engines.engine import CheckpointMismatch
from realtide.engines.runtime.slots import SlotLease

Control = SetLookahead | SetInterim | SetEndpointing | SetBoosts | Flush | Finish
FORMAT = 2


@dataclass(slots=True)
class Due:
    """A control and the encoder frame before which it takes effect.

    `position` counts the client's samples.
    """

    frame: int
    position: int
    control: Control
    complete: bool = False  # flush, finish: the frame before it was completed


@dataclass(slots=True)
class Work:
    """What a session puts into one step: audio of new frames, the first one, how the step ends for it."""

    drawn: Drawn
    first: int
    ending: str | None  # "flush", "finish" or None

    @property
    def frames(self) -> int:
        """Number of new encoder frames."""
        return self.drawn.units


class SpeechSession:
    """See `engine.Session`. Made by `AncatEngine.open` and `AncatEngine.restore`."""

    def __init__(
        self,
        lease: SlotLease,
        rows: Rows,
        frontend: Frontend,
        state: DecodeState,
        decoder: Decoder,
        frame_ms: int,
        step_frames: int,
        budget: float,
    ) -> None:
        self._lease = lease
        self._rows = rows
        self._frontend = frontend
        self._decoder = decoder
        self._frame_ms = frame_ms
        self._step_frames = step_frames
        self._budget = budget
        self._due: deque[Due] = deque()
        self._held: deque[SpeechInput] = deque()
        self._finishing = False
        self._finished = False
        self.lost: Exception | None = None  # what a step failed with after it had taken input
        self._waiting_since: float | None = None
        self._last_received = 0.0
        self._silence = 0  # samples that flushes inserted and the decoder has been told of
        self.decode = state

    @property
    def slot(self) -> int:
        """Row block of this stream in the encoder's state."""
        return self._lease.slot

    @property
    def options(self) -> SpeechOptions:
        """Options in force."""
        return self.decode.options

    @property
    def cap(self) -> int:
        """Hard cap on the lookahead in encoder frames."""
        limit = self.options.max_lookahead_ms
        return NO_CAP if limit is None else limit // self._frame_ms

    @property
    def done(self) -> bool:
        """True once the last final is out, or the session was closed."""
        return self._finished or not self._lease.held

    def push(self, item: SpeechInput) -> Sequence[SpeechEvent]:
        """Buffer audio or a control. Raises ValueError for audio after `Finish`."""
        if not self._lease.held:
            return ()
        if isinstance(item, Audio) and self._finishing:
            raise ValueError("audio after finish")
        if self._held or (self._due and isinstance(self._due[-1].control, Flush | Finish)):
            # A flush completes the last frame with silence, so what follows it waits until its step is over.
            self._held.append(item)
            self._finishing |= isinstance(item, Finish)
            return ()
        return self._accept(item)

    def _accept(self, item: SpeechInput) -> Sequence[SpeechEvent]:
        if isinstance(item, Audio):
            self._frontend.push(item.samples)
            self._last_received = item.received
            if self._waiting_since is None and self._frontend.frames_ready:
                self._waiting_since = item.received
            return ()
        self._finishing |= isinstance(item, Finish)
        frame = self._frontend.frames_taken + self._frontend.frames_ready
        self._due.append(Due(frame, self._frontend.samples_pushed, item))
        return self._settle()

    def runnable(self) -> bool:
        """True if frames are complete, a flush or finish is due, or there is a failure to be told of."""
        if not self._lease.held or self._finished:
            return False
        return self._frontend.frames_ready > 0 or bool(self._due) or self.lost is not None

    def full(self) -> bool:
        """True if more audio is of no use for the coming step, or is ahead of the clock and can wait.

        What live streams have due shares a step; a file that comes faster than it would be spoken adds one
        frame to it, not twelve.
        """
        ready = self._frontend.frames_ready
        return (
            bool(self._due)
            or ready >= self._step_frames
            or (ready > 0 and self._last_received > time.monotonic())
        )

    def backlog(self) -> int:
        """Complete encoder frames that no step has taken yet."""
        return self._frontend.frames_ready

    def deadline(self) -> float:
        """When the oldest complete frame should have been worked on, monotonic seconds."""
        since = self._last_received if self._waiting_since is None else self._waiting_since
        return since + self._budget

    def take(self) -> Work:
        """What is ready for the coming step, at most `step_frames` frames, none beyond the next control."""
        limit = self._step_frames
        first = self._frontend.frames_taken
        due = self._due[0] if self._due else None
        if due is not None and isinstance(due.control, Flush | Finish):
            if not due.complete and self._frontend.frames_ready < limit:
                # The frame that was started ends in silence.
                if isinstance(due.control, Finish):
                    self._frontend.finish()
                else:
                    self._frontend.flush()
                due.frame, due.complete = first + self._frontend.frames_ready, True
        elif due is not None:
            limit = min(limit, due.frame - first)
        drawn = self._frontend.draw(limit)
        ending = None
        if due is not None and due.complete and due.frame == first + drawn.units:
            ending = "flush" if isinstance(due.control, Flush) else "finish"
        rate = self._frontend.sample_rate
        self.decode.audio_end = self._frontend.samples_pushed / rate
        self._waiting_since = self._last_received if self._frontend.frames_ready else None
        return Work(drawn, first, ending)

    def ended(self, work: Work) -> list[SpeechEvent]:
        """The step with `work` is over: apply what was due after it. Returns receipts."""
        if work.ending is not None:
            due = self._due.popleft()
            if isinstance(due.control, Finish):
                self._finished = True
                return []
            rate = self._frontend.sample_rate
            inserted = self._frontend.samples_inserted
            self.decode.shift += (inserted - self._silence) / rate
            self._silence = inserted
            assert isinstance(due.control, Flush)
            events = [Applied(due.control.control_id, due.position), *self._settle()]
            while self._held and not (self._due and isinstance(self._due[-1].control, Flush | Finish)):
                events.extend(self._accept(self._held.popleft()))
            return events
        return self._settle()

    def _settle(self) -> list[SpeechEvent]:
        """Apply the controls whose frame has come; flush and finish wait for their step."""
        events: list[SpeechEvent] = []
        while self._due and self._due[0].frame <= self._frontend.frames_taken:
            control = self._due[0].control
            if isinstance(control, Flush | Finish):
                break
            due = self._due.popleft()
            self._decoder.set_options(self.decode, changed(self.options, control))
            events.append(Applied(control.control_id, due.position))
        return events

    def collect(self) -> Sequence[SpeechEvent]:
        """None: all work is done in steps."""
        return ()

    def settle(self) -> Sequence[SpeechEvent]:
        """None, see `collect`."""
        return ()

    def export(self) -> bytes:
        """Serialize everything but controls that have not taken effect: whoever resumes sends those again.

        See `AncatEngine.restore`. Raises ValueError once closed; or what a step failed with that had taken
        input.
        """
        if not self._lease.held:
            raise ValueError("the session is closed")
        if self.lost is not None:
            raise self.lost
        front = self._frontend.export()
        tensors = {f"front.{name}": value for name, value in front.items() if isinstance(value, np.ndarray)}
        tensors["rows"] = np.frombuffer(self._rows.export(self.slot), np.uint8)
        tensors["decode"] = np.frombuffer(self.decode.export(), np.uint8)
        held = [item.samples for item in self._held if isinstance(item, Audio)]
        tensors["held"] = np.concatenate([np.zeros(0, np.float32), *held])
        plain = {
            "format": FORMAT,
            "front": {name: value for name, value in front.items() if not isinstance(value, np.ndarray)},
            "finished": self._finished,
            "silence": self._silence,
        }
        return save_tensors(tensors, {"session": json.dumps(plain)})

    def resume_at(self, plain: dict[str, Any], held: Float32) -> None:
        """Take over the rest of an exported session; raises KeyError, TypeError, ValueError if damaged."""
        self._finished = self._finishing = bool(plain["finished"])
        self._silence = int(plain["silence"])
        if len(held):
            self._frontend.push(held)

    def close(self) -> None:
        """Free the slot, once."""
        self._lease.free()


def changed(options: SpeechOptions, control: Control) -> SpeechOptions:
    """Options after a control."""
    if isinstance(control, SetLookahead):
        cap = options.max_lookahead_ms
        if control.max_lookahead_ms is not None:
            cap = None if control.max_lookahead_ms < 0 else control.max_lookahead_ms
        bias = options.lookahead_bias if control.bias is None else control.bias
        return replace(options, lookahead_bias=bias, max_lookahead_ms=cap)
    if isinstance(control, SetInterim):
        return replace(options, interim_results=control.enabled)
    if isinstance(control, SetEndpointing):
        return replace(options, endpointing=control.rules)
    if isinstance(control, SetBoosts):
        return replace(options, boosts=control.boosts)
    return options


@dataclass(slots=True)
class Exported:
    """The parts of an exported session."""

    plain: dict[str, Any]
    front: dict[str, Any]
    rows: bytes
    decode: bytes
    held: Float32


def unpack(checkpoint: bytes) -> Exported:
    """Take an exported session apart. Raises CheckpointMismatch."""
    try:
        size = int.from_bytes(checkpoint[:8], "little")
        plain = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["session"])
        tensors = load_tensors(checkpoint)
        if plain["format"] != FORMAT:
            raise CheckpointMismatch(
                f"checkpoint has session format {plain['format']}, this program reads {FORMAT}"
            )
        front = plain["front"] | {
            name.removeprefix("front."): t for name, t in tensors.items() if name.startswith("front.")
        }
        rows, decode = tensors["rows"].tobytes(), tensors["decode"].tobytes()
        return Exported(plain, front, rows, decode, np.asarray(tensors["held"], np.float32))
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
