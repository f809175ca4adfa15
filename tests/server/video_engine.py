"""A small deterministic engine for the server's tests of video: flat frames whose colour says what they show.

Frames are made in blocks, as the first credit within a block allows; what lies beyond the credit is held. A
frame's red is its index, its green comes from the prompt and its blue from the seed. State is a small
dataclass, exported as JSON. `tests.server.engine` is its like for speech.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from realtide.engines.engine import CheckpointMismatch, Session, SlotsExhausted, StageTimer
from realtide.engines.longlive import types

SIZES = ((32, 16), (16, 16))
FIRST_BLOCK, BLOCK = 3, 4
POISON = "poison"  # a prompt with this word makes the session's step raise


def colour(index: int, prompt: str, seed: int) -> tuple[int, int, int]:
    """Red, green and blue of a frame."""
    return index % 251, zlib.crc32(prompt.encode()) % 256, seed % 256


def info(**changes: Any) -> types.VideoModelInfo:
    values: dict[str, Any] = {
        "version": "0.3",
        "backend": "onnxruntime",
        "precision": "fp32",
        "device": "cpu",
        "license": "Apache-2.0",
        "sizes": SIZES,
        "frames_per_second": 16.0,
        "frames_per_second_range": (1.0, 60.0),
        "first_block": FIRST_BLOCK,
        "block": BLOCK,
        "max_prompt_tokens": 8,
        "count_tokens": lambda prompt: len(prompt.split()) + 1,
        "session_bytes": 12345,
    }
    return types.VideoModelInfo(**(values | changes))


@dataclass
class State:
    prompt: str
    width: int
    height: int
    seed: int
    length: int | None
    handed: int = 0  # frames handed out
    made: int = 0  # frames denoised; those from `handed` on are held
    paused: bool = False
    shown: bool = False  # the prompt's event went out
    wanted: list[tuple[str, str, int | None]] = field(default_factory=list)
    # Of frames that are held: index where a prompt begins, its control, text, and whether it is the first.
    changes: list[tuple[int, str, str, int]] = field(default_factory=list)


class ClipSession:
    def __init__(self, engine: ClipEngine, state: State, options: types.VideoOptions) -> None:
        self.engine = engine
        self.state = state
        self.options = options
        self.credit = options.credit
        self.prompts = {state.handed: state.prompt}  # by first frame, of what is held
        self.began = time.monotonic()
        self.finishing = False
        self.closed = False
        self.failed = False
        self.inputs: list[Any] = []

    @property
    def done(self) -> bool:
        state = self.state
        ended = state.length is not None and state.handed >= state.length
        return ended or (self.finishing and (state.paused or not self.runnable()))

    @property
    def end(self) -> int:
        """Frames below it may be handed out."""
        length = self.state.length
        return self.credit if length is None else min(self.credit, length)

    def push(self, item: Any) -> list[Any]:
        self.engine.check_thread()
        self.inputs.append(item)
        state = self.state
        if isinstance(item, types.Credit):
            assert item.position > self.credit, "a credit that adds nothing went to the engine"
            self.credit = item.position
        elif isinstance(item, types.Finish):
            self.finishing = True
        elif isinstance(item, types.SetPrompt):
            state.wanted.append((item.control_id, item.prompt, item.at))
        else:
            state.paused = isinstance(item, types.Pause)
            return [types.Applied(item.control_id, state.handed)]
        return []

    def runnable(self) -> bool:
        return not self.state.paused and self.state.handed < self.end

    def full(self) -> bool:
        return False

    def deadline(self) -> float:
        return self.began + self.engine.budget

    def collect(self) -> list[Any]:
        return []

    def settle(self) -> list[Any]:
        return []

    def export(self) -> bytes:
        self.engine.check_thread()
        return json.dumps({"state": asdict(self.state), "prompts": self.prompts}).encode()

    def close(self) -> None:
        self.engine.check_thread()
        if not self.closed:
            self.closed = True
            self.engine.taken -= 1

    def advance(self, on_stage: StageTimer) -> list[Any]:
        state = self.state
        events: list[Any] = []
        if POISON in state.prompt:
            raise RuntimeError("poisoned prompt")
        if state.handed >= state.made:
            events += self._block()
        on_stage("denoise", 0.001, 1)
        while state.handed < min(state.made, self.end):
            events += self._change()
            cut = min((at for at, *_ in state.changes), default=state.made)
            count = min(self.options.group, state.made - state.handed, self.end - state.handed)
            count = min(count, max(cut - state.handed, 1))
            events.append(self._frames(state.handed, count))
            state.handed += count
        return events

    def _block(self) -> list[Any]:
        state = self.state
        count = BLOCK if state.made else FIRST_BLOCK
        applied = [
            types.Applied(name, state.made) for name, _, at in state.wanted if at is None or at <= state.made
        ]
        due = [one for one in state.wanted if one[2] is None or one[2] <= state.made]
        state.wanted = [one for one in state.wanted if one not in due]
        if due:
            state.prompt = due[-1][1]
            state.changes.append((state.made, due[-1][0], due[-1][1], 0 if not state.made else 2))
        elif not state.made:
            state.changes.append((0, "", state.prompt, 0))
        self.prompts[state.made] = state.prompt
        state.made += count
        if state.length is not None:
            state.made = min(state.made, state.length)
        self.began = time.monotonic()
        return [*applied, types.Denoised(state.made - count, count)]

    def _change(self) -> list[Any]:
        state = self.state
        if state.changes and state.changes[0][0] <= state.handed:
            at, name, prompt, replayed = state.changes.pop(0)
            return [types.PromptApplied(name, prompt, at, 0.025 * bool(replayed), replayed)]
        return []

    def _frames(self, first: int, count: int) -> types.Frames:
        state = self.state
        frames = np.empty((count, state.height, state.width, 3), np.uint8)
        for index in range(count):
            prompt = self.prompts[max(at for at in self.prompts if at <= first + index)]
            frames[index] = colour(first + index, prompt, state.seed)
        assert self.options.encode is not None
        return types.Frames(first, count, self.options.encode(first, frames), first + count, self.began)


class ClipEngine:
    """`delay` seconds of sleep per step; `gate` holds steps up."""

    def __init__(
        self,
        slots: int = 4,
        *,
        model: str = "clips",
        delay: float = 0.0,
        budget: float = 0.5,
        gate: threading.Event | None = None,
        **changes: Any,
    ) -> None:
        self.name = "clips-engine"
        self.model = model
        self.slots = slots
        self.max_batch = slots
        self.cache_bytes = slots * 1000
        self.info = info(**changes)
        self.taken = 0
        self.parked = 0
        self.budget = budget
        self.delay = delay
        self.gate = gate
        self.at_gate = False
        self.opened: deque[ClipSession] = deque(maxlen=100)
        self._thread: int | None = None

    @property
    def free_slots(self) -> int:
        return self.slots - self.taken

    def check_thread(self) -> None:
        thread = threading.get_ident()
        assert self._thread in (None, thread), "the engine was touched from two threads"
        self._thread = thread

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        pass

    def close(self) -> None:
        pass

    def open(self, options: types.VideoOptions) -> ClipSession:
        return self._take(
            State(options.prompt, options.width, options.height, options.seed, options.length), options
        )

    def restore(self, checkpoint: bytes, options: types.VideoOptions | None = None) -> ClipSession:
        assert options is not None
        try:
            data = json.loads(checkpoint)
            state = State(**data["state"])
            prompts = {int(at): prompt for at, prompt in data["prompts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"not of this engine: {error}") from None
        state.wanted = [(one[0], one[1], one[2]) for one in state.wanted]
        state.changes = [(one[0], one[1], one[2], one[3]) for one in state.changes]
        session = self._take(state, options)
        session.prompts = prompts
        return session

    def _take(self, state: State, options: types.VideoOptions) -> ClipSession:
        self.check_thread()
        if self.taken >= self.slots:
            raise SlotsExhausted
        self.taken += 1
        session = ClipSession(self, state, options)
        self.opened.append(session)
        return session

    def batch_key(self, session: Session) -> Hashable:
        return 0

    def step(self, sessions: Sequence[Session], on_stage: StageTimer) -> list[list[Any]]:
        self.check_thread()
        if self.gate is not None:
            self.at_gate = True
            self.gate.wait(10)
        if self.delay:
            time.sleep(self.delay)
        clips = [session for session in sessions if isinstance(session, ClipSession)]
        if len(clips) > 1 and any(POISON in clip.state.prompt for clip in clips):
            raise RuntimeError("poisoned batch")
        return [clip.advance(on_stage) for clip in clips]
