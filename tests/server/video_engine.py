"""A small deterministic engine for the server's tests of video: flat frames whose colour says what they show.

Blocks are made in steps, as the first credit within a block allows; a thread of the engine's own makes frames
of them, as far as the credit goes. A frame's red is its index, its green comes from the prompt and its blue
from the seed. State is a small dataclass, exported as JSON. `tests.server.engine` is its like for speech.
"""

from __future__ import annotations

import json
import queue
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
THORN = "thorn"  # with this one the thread does


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
    seed: int
    sent: int = 0  # frames handed out
    made: int = 0  # frames of blocks that are done; those from `sent` on are held
    paused: bool = False
    # First frame, control, text and replayed latents of prompts that no frame has shown yet.
    changes: list[tuple[int, str, str, int]] = field(default_factory=list)
    # First frame and text of those that frames yet to be made show.
    prompts: list[tuple[int, str]] = field(default_factory=list)


class ClipSession:
    def __init__(self, engine: ClipEngine, state: State, options: types.VideoOptions) -> None:
        self.engine = engine
        self.state = state
        self.options = options
        self.credit = options.credit
        self.ready = state.sent  # frames below it have been made ready by the thread
        self.wanted: list[types.SetPrompt] = []
        self.beside: deque[Any] = deque()
        self.lock = threading.Lock()  # held by the thread while it works for the session
        self.resting = False
        self.began = time.monotonic()
        self.finishing = False
        self.closed = False

    @property
    def end(self) -> int:
        """Frames below it may be handed out."""
        length = self.options.length
        return self.credit if length is None else min(self.credit, length)

    @property
    def done(self) -> bool:
        if self.state.sent == self.options.length:
            return True
        return self.finishing and (self.state.paused or self.state.sent >= self.end)

    def push(self, item: Any) -> list[Any]:
        self.engine.check_thread()
        if isinstance(item, types.Credit):
            assert item.position > self.credit, "a credit that adds nothing went to the engine"
            self.credit = item.position
        elif isinstance(item, types.Finish):
            self.finishing = True
        elif isinstance(item, types.SetPrompt):
            self.wanted.append(item)
        elif isinstance(item, types.Pause):
            self.state.paused = True
            with self.lock:  # what is being made now is still handed out
                pass
            return [*self.collect(), types.Applied(item.control_id, self.state.sent)]
        else:
            self.state.paused = False
            self.engine.work_for(self)
            return [types.Applied(item.control_id, self.state.sent)]
        self.engine.work_for(self)
        return []

    def runnable(self) -> bool:
        state = self.state
        return not state.paused and state.made < self.end and state.made - self.ready <= BLOCK

    def full(self) -> bool:
        return False

    def deadline(self) -> float:
        return self.began + self.engine.budget

    def collect(self) -> list[Any]:
        self.engine.check_thread()
        found = []
        while self.beside:
            found.append(self.beside.popleft())
            if isinstance(found[-1], Exception):
                raise found[-1]
            if isinstance(found[-1], types.Frames):
                self.state.sent += found[-1].count
        return found

    def settle(self) -> list[Any]:
        self.resting = True
        with self.lock:
            return self.collect()

    def export(self) -> bytes:
        self.engine.check_thread()
        try:
            assert self.ready == self.state.sent
            return json.dumps(asdict(self.state)).encode()
        finally:
            self.resting = False
            self.engine.work_for(self)

    def close(self) -> None:
        self.engine.check_thread()
        if not self.closed:
            self.closed = True
            self.engine.taken -= 1

    def advance(self, on_stage: StageTimer) -> list[Any]:
        """Make a block; it has the last prompt that is due."""
        state = self.state
        first, count = state.made, BLOCK if state.made else FIRST_BLOCK
        due = [one for one in self.wanted if one.at is None or one.at <= first]
        self.wanted = [one for one in self.wanted if one not in due]
        if due:
            state.prompt = due[-1].prompt
            state.changes.append((first, due[-1].control_id, state.prompt, 2 if first else 0))
        elif not first:
            state.changes.append((0, "", state.prompt, 0))
        state.prompts.append((first, state.prompt))
        if POISON in state.prompt:
            raise RuntimeError("poisoned prompt")
        self.began = time.monotonic()
        state.made += count
        on_stage("denoise", 0.001, 1)
        self.engine.work_for(self)
        return [*(types.Applied(one.control_id, first) for one in due), types.Denoised(first, count)]

    def make_frames(self) -> None:
        """The engine's thread: as far as there are blocks and credit."""
        state = self.state
        with self.lock:
            try:
                while self.ready < min(state.made, self.end):
                    if self.closed or self.resting or state.paused:
                        break
                    self._make_some()
                    self.engine.wake(self)
            except Exception as error:
                self.beside.append(error)
        self.engine.wake(self)

    def _make_some(self) -> None:
        state, first = self.state, self.ready
        if state.changes and state.changes[0][0] <= first:
            at, name, prompt, replayed = state.changes.pop(0)
            self.beside.append(types.PromptApplied(name, prompt, at, 0.025 * bool(replayed), replayed))
        while len(state.prompts) > 1 and state.prompts[1][0] <= first:
            state.prompts.pop(0)
        stop = min([state.made, self.end, first + self.options.group, *(at for at, *_ in state.changes)])
        frames = np.empty((stop - first, self.options.height, self.options.width, 3), np.uint8)
        for index in range(first, stop):
            shown = [prompt for at, prompt in state.prompts if at <= index][-1]
            frames[index - first] = colour(index, shown, state.seed)
        if THORN in shown:
            raise RuntimeError("the thread has a thorn")
        assert self.options.encode is not None
        data = self.options.encode(first, frames)
        self.engine.on_stage("encode", 0.001, 1)
        self.ready = stop
        self.beside.append(types.Frames(first, stop - first, data, stop, self.began))


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
        self.computes: tuple[str, str] | None = None
        self.budget = budget
        self.delay = delay
        self.gate = gate
        self.at_gate = False
        self.opened: deque[ClipSession] = deque(maxlen=100)
        self.wake: Callable[[Session], None] = lambda session: None
        self.on_stage: StageTimer = lambda stage, seconds, batch: None
        self._thread: int | None = None
        self._work: queue.SimpleQueue[ClipSession | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run)

    @property
    def free_slots(self) -> int:
        return self.slots - self.taken

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        self.wake, self.on_stage = wake, on_stage
        self._worker.start()

    def close(self) -> None:
        self._work.put(None)
        if self._worker.is_alive():
            self._worker.join()

    def work_for(self, session: ClipSession) -> None:
        self._work.put(session)

    def _run(self) -> None:
        while (session := self._work.get()) is not None:
            session.make_frames()

    def check_thread(self) -> None:
        thread = threading.get_ident()
        assert self._thread in (None, thread), "the engine was touched from two threads"
        self._thread = thread

    def open(self, options: types.VideoOptions) -> ClipSession:
        return self._take(State(options.prompt, options.seed), options)

    def restore(self, checkpoint: bytes, options: types.VideoOptions | None = None) -> ClipSession:
        """Prompts without their receipt are not in a checkpoint: the client sends them again."""
        assert options is not None
        try:
            state = State(**json.loads(checkpoint))
            state.changes = [(at, name, prompt, replayed) for at, name, prompt, replayed in state.changes]
            state.prompts = [(at, prompt) for at, prompt in state.prompts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"not of this engine: {error}") from None
        session = self._take(state, options)
        self.work_for(session)
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
