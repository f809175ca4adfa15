"""One live speech stream: everything it owns in one object (architecture rule 3; ours).

A session buffers audio and controls in the order in which they came and hands the engine work in encoder frames. A control
takes effect at the first encoder frame that was not complete when it arrived, so what it changes does not depend on how
the server batches steps.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from realtide.engines.ancat.config import NO_CAP
from realtide.engines.ancat.decode_state import DecodeState
from realtide.engines.ancat.decoder import Decoder
from realtide.engines.ancat.frontend import Float32, Frontend
from realtide.engines.ancat.types import (
    Applied,
    Audio,
    EndpointRules,
    Finish,
    Flush,
    PhraseBoost,
    SetBoosts,
    SetEndpointing,
    SetInterim,
    SetLookahead,
    SpeechEvent,
    SpeechInput,
    SpeechOptions,
)
from realtide.engines.engine import CheckpointMismatch
from realtide.engines.runtime.slots import SlotLease, SlotState

Control = SetLookahead | SetInterim | SetEndpointing | SetBoosts | Flush | Finish
FORMAT = 1


@dataclass(slots=True)
class Due:
    """A control and the encoder frame before which it takes effect; `position` counts the client's samples."""

    frame: int
    position: int
    control: Control


@dataclass(slots=True)
class Work:
    """What a session puts into one step: windows [n, 7, mel], first frame, and how the step ends for it."""

    windows: Float32
    first: int
    ending: str | None  # "flush", "finish" or None

    @property
    def frames(self) -> int:
        """Number of new encoder frames."""
        return len(self.windows)


class SpeechSession:
    """See `engine.Session`. Made by `AncatEngine.open` and `AncatEngine.restore`."""

    def __init__(
        self,
        lease: SlotLease,
        rows: SlotState,
        frontend: Frontend,
        state: DecodeState,
        decoder: Decoder,
        frame_ms: int,
        budget: float,
    ) -> None:
        self._lease = lease
        self._rows = rows
        self._frontend = frontend
        self._decoder = decoder
        self._frame_ms = frame_ms
        self._budget = budget
        self._due: deque[Due] = deque()
        self._finishing = False
        self._finished = False
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
        if isinstance(item, Audio):
            if self._finishing:
                raise ValueError("audio after finish")
            self._frontend.push(item.samples)
            self._last_received = item.received
            if self._waiting_since is None and self._frontend.frames_ready:
                self._waiting_since = item.received
            return ()
        position = self._frontend.samples_pushed
        if isinstance(item, Flush):
            self._frontend.flush()
        elif isinstance(item, Finish):
            self._finishing = True
            self._frontend.finish()
        frame = self._frontend.frames_taken + self._frontend.frames_ready
        self._due.append(Due(frame, position, item))
        return self._settle()

    def runnable(self) -> bool:
        """True if frames are complete or a flush or finish is due."""
        return (
            self._lease.held and not self._finished and (self._frontend.frames_ready > 0 or bool(self._due))
        )

    def backlog(self) -> int:
        """Complete encoder frames that no step has taken yet."""
        return self._frontend.frames_ready

    def deadline(self) -> float:
        """When the oldest complete frame should have been worked on, monotonic seconds."""
        since = self._last_received if self._waiting_since is None else self._waiting_since
        return since + self._budget

    def take(self, limit: int) -> Work:
        """At most `limit` frames for the coming step, none beyond the next control."""
        first = self._frontend.frames_taken
        if self._due:
            limit = min(limit, self._due[0].frame - first)
        windows = self._frontend.take(limit)
        ending = None
        if self._due and self._due[0].frame == first + len(windows):
            control = self._due[0].control
            ending = (
                "flush" if isinstance(control, Flush) else "finish" if isinstance(control, Finish) else None
            )
        rate = self._frontend.sample_rate
        self.decode.audio_end = self._frontend.samples_pushed / rate
        self._waiting_since = self._last_received if self._frontend.frames_ready else None
        return Work(windows, first, ending)

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
            return [Applied(due.control.control_id, due.position), *self._settle()]
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

    def export(self) -> bytes:
        """Serialize everything; see `AncatEngine.restore`. Raises ValueError once closed."""
        if not self._lease.held:
            raise ValueError("the session is closed")
        front = self._frontend.export()
        tensors = {f"front.{name}": value for name, value in front.items() if isinstance(value, np.ndarray)}
        tensors["rows"] = np.frombuffer(self._rows.export(self.slot), np.uint8)
        tensors["decode"] = np.frombuffer(self.decode.export(), np.uint8)
        plain = {
            "format": FORMAT,
            "front": {name: value for name, value in front.items() if not isinstance(value, np.ndarray)},
            "due": [
                [due.frame, due.position, type(due.control).__name__, asdict(due.control)]
                for due in self._due
            ],
            "finishing": self._finishing,
            "finished": self._finished,
            "silence": self._silence,
        }
        return save_tensors(tensors, {"session": json.dumps(plain)})

    def resume_at(self, plain: dict[str, Any]) -> None:
        """Take over the rest of an exported session; raises KeyError, TypeError, ValueError if damaged."""
        self._due = deque(
            Due(int(frame), int(position), _control(kind, values))
            for frame, position, kind, values in plain["due"]
        )
        self._finishing, self._finished = bool(plain["finishing"]), bool(plain["finished"])
        self._silence = int(plain["silence"])

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


def _control(kind: str, values: dict[str, Any]) -> Control:
    kinds: dict[str, type[Control]] = {
        c.__name__: c for c in (SetLookahead, SetInterim, SetEndpointing, SetBoosts, Flush, Finish)
    }
    if kind == "SetEndpointing":
        values = values | {"rules": EndpointRules(**values["rules"])}
    elif kind == "SetBoosts":
        values = values | {
            "boosts": tuple(PhraseBoost(tuple(b["phrases"]), b["boost"]) for b in values["boosts"])
        }
    return kinds[kind](**values)


def unpack(checkpoint: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """(plain values, front end state, slot rows, decoder state) of an exported session. Raises CheckpointMismatch."""
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
        return plain, front, tensors["rows"].tobytes(), tensors["decode"].tobytes()
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
