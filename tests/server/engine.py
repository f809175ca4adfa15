"""A small deterministic engine for the server's tests: it hears tone bursts as words, on real slots.

Audio is consumed in frames of 40 ms. A loud frame after a quiet one starts a word, ``burst1``, ``burst2``...
in the utterance; `final_silence_ms` of quiet after a word ends the utterance. State is a small dataclass,
exported as JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from realtide.engines.ancat import types
from realtide.engines.engine import CheckpointMismatch, Session, SlotsExhausted, StageTimer

FRAME = 0.04
LOUD = 0.1
POISON = 0.777  # a sample of exactly this value makes the session's step raise


@dataclass(frozen=True)
class Info:
    version: str = "1.2"
    backend: str = "onnxruntime"
    precision: str = "fp32"
    device: str = "cpu"
    license: str = "Apache-2.0"
    language_codes: tuple[str, ...] = ("en-US", "en-GB")
    sample_rate: int = 16000
    sample_rate_range: tuple[int, int] = (8000, 48000)
    frame_seconds: float = FRAME
    front_end_lookahead_ms: float = 25.0
    max_lookahead_ms: float = 640.0
    max_beam: int = 8
    lookahead_bias_range: tuple[float, float] = (-8.0, 8.0)
    max_boost: float = 10.0
    max_utterance_ms: int = 30000
    characters: frozenset[str] = frozenset("abcdefghijklmnopqrstuvwxyz'")


@dataclass
class State:
    rate: int
    interim: bool
    final_silence: float
    frames: int = 0  # consumed
    samples: int = 0  # pushed
    words: list[tuple[str, float, float]] = field(default_factory=list)
    loud: bool = False
    quiet: float = 0.0
    utterance: int = 0
    start: float = 0.0
    finishing: bool = False
    finished: bool = False


class BurstSession:
    def __init__(self, engine: BurstEngine, state: State, label: str) -> None:
        self.engine = engine
        self.state = state
        self.label = label
        self.pending = np.zeros(0, np.float32)
        self.arrived: list[tuple[int, float]] = []
        self.queue: list[Any] = []
        self.closed = False
        self.beside: list[Any] = []  # what work beside steps has made; an exception is raised
        self.settled = 0

    @property
    def size(self) -> int:
        return round(FRAME * self.state.rate)

    @property
    def done(self) -> bool:
        return self.state.finished

    def push(self, item: Any) -> list[Any]:
        self.engine.check_thread()
        state = self.state
        if isinstance(item, types.Audio):
            assert item.samples.dtype == np.float32
            assert np.isfinite(item.samples).all()
            self.pending = np.concatenate([self.pending, item.samples])
            state.samples += len(item.samples)
            self.arrived.append((state.samples, item.received))
            return []
        if isinstance(item, types.Finish):
            state.finishing = True
            return []
        if isinstance(item, types.Flush):
            return [types.Applied(item.control_id, state.samples), *self._cut("flush")]
        if isinstance(item, types.SetInterim):
            state.interim = item.enabled
        if isinstance(item, types.SetEndpointing):
            state.final_silence = item.rules.final_silence_ms / 1000
        return [types.Applied(item.control_id, state.samples)]

    def runnable(self) -> bool:
        return not self.state.finished and (len(self.pending) >= self.size or self.state.finishing)

    def full(self) -> bool:
        return self.state.finishing or len(self.pending) >= self.engine.step_frames * self.size

    def deadline(self) -> float:
        for end, when in self.arrived:
            if end > self.state.frames * self.size:
                return when + self.engine.budget
        return time.monotonic()

    def collect(self) -> list[Any]:
        self.engine.check_thread()
        found, self.beside = self.beside, []
        for event in found:
            if isinstance(event, Exception):
                raise event
        return found

    def settle(self) -> list[Any]:
        self.settled += 1
        return self.collect()

    def work_beside(self, *made: Any) -> None:
        """As a thread of the engine's own does."""
        self.beside += made
        self.engine.wake(self)

    def export(self) -> bytes:
        self.engine.check_thread()
        return json.dumps(
            {"state": asdict(self.state), "pending": self.pending.tolist(), "label": self.label}
        ).encode()

    def close(self) -> None:
        self.engine.check_thread()
        if not self.closed:
            self.closed = True
            self.pending = np.zeros(0, np.float32)
            self.arrived.clear()
            self.engine.taken -= 1

    def advance(self) -> list[Any]:
        events = self._frame()
        for _ in range(self.engine.step_frames - 1):
            if not self.state.finished and len(self.pending) >= self.size:
                events += self._frame()
        return events

    def _frame(self) -> list[Any]:
        state = self.state
        events: list[Any] = []
        frame, self.pending = self.pending[: self.size], self.pending[self.size :]
        if len(frame) == self.size:
            if np.any(frame == np.float32(POISON)):
                raise RuntimeError("poisoned audio")
            at = state.frames * FRAME
            state.frames += 1
            self.arrived = [one for one in self.arrived if one[0] > state.frames * self.size]
            loud = bool(np.abs(frame).max() > LOUD)
            if loud and not state.loud:
                if not state.words:
                    events.append(types.EndpointEvent("speech_start", at, state.utterance))
                state.words.append((f"burst{len(state.words) + 1}", at, at + FRAME))
            elif loud:
                text, start, _ = state.words[-1]
                state.words[-1] = (text, start, at + FRAME)
            state.quiet = 0.0 if loud else state.quiet + FRAME
            if state.interim and (loud != state.loud or self.engine.chatty):
                events.append(self._partial())
            state.loud = loud
            if state.words and state.quiet >= state.final_silence:
                events += self._cut("endpoint")
        if state.finishing and len(self.pending) < self.size:
            events += self._cut("finish")
            state.finished = True
        return events

    def _words(self) -> tuple[types.Word, ...]:
        return tuple(types.Word(text, start, end, 0.9, 0.08) for text, start, end in self.state.words)

    def _text(self) -> str:
        return " ".join(word[0] for word in self.state.words)

    def _partial(self) -> types.Partial:
        now = self.state.frames * FRAME
        return types.Partial(self._text(), self._words(), 0.5, now, 0.08, self.state.utterance)

    def _cut(self, reason: str) -> list[Any]:
        state = self.state
        now = state.frames * FRAME
        end = state.words[-1][2] if state.words else state.start
        final = types.Final(
            self._text(), self._words(), 0.9, state.start, now, end, now, 0.08, 0.12, state.utterance, reason
        )
        event = types.EndpointEvent("end", now, state.utterance)
        state.words = []
        state.loud = False
        state.quiet = 0.0
        state.utterance += 1
        state.start = now
        return [final, event]


class BurstEngine:
    """`delay` seconds of sleep per step; `gate` holds steps up; `chatty` gives a partial per frame.

    A step takes at most `step_frames` frames of a session.
    """

    def __init__(
        self,
        slots: int = 8,
        *,
        model: str = "bursts",
        max_batch: int | None = None,
        delay: float = 0.0,
        budget: float = 0.1,
        chatty: bool = False,
        gate: threading.Event | None = None,
        key: Callable[[BurstSession], Hashable] = lambda session: 0,
        step_frames: int = 1,
    ) -> None:
        self.name = "bursts-engine"
        self.model = model
        self.slots = slots
        self.max_batch = max_batch or slots
        self.cache_bytes = slots * 100
        self.info = Info()
        self.taken = 0
        self.budget = budget
        self.delay = delay
        self.chatty = chatty
        self.gate = gate
        self.key = key
        self.step_frames = step_frames
        self.batches: list[list[str]] = []
        self.opened: list[BurstSession] = []
        self.break_batches = 0  # so many batched steps raise though no session is at fault
        self.at_gate = False  # a step is being held up
        self.parked = 0
        self.computes: tuple[str, str] | None = None
        self.wake: Callable[[Session], None] = lambda session: None
        self.closed = 0
        self._thread: int | None = None

    @property
    def free_slots(self) -> int:
        return self.slots - self.taken

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        self.wake = wake

    def close(self) -> None:
        self.closed += 1

    def check_thread(self) -> None:
        thread = threading.get_ident()
        assert self._thread in (None, thread), "the engine was touched from two threads"
        self._thread = thread

    def open(self, options: types.SpeechOptions) -> BurstSession:
        return self._take(
            State(options.sample_rate, options.interim_results, options.endpointing.final_silence_ms / 1000)
        )

    def restore(self, checkpoint: bytes, options: Any | None = None) -> BurstSession:
        try:
            data = json.loads(checkpoint)
            names = {one.name for one in fields(State)}
            state = State(**{name: value for name, value in data["state"].items() if name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"not of this engine: {error}") from None
        state.words = [(word[0], word[1], word[2]) for word in state.words]
        session = self._take(state)
        session.pending = np.array(data["pending"], np.float32)
        return session

    def _take(self, state: State) -> BurstSession:
        self.check_thread()
        if self.taken >= self.slots:
            raise SlotsExhausted
        self.taken += 1
        session = BurstSession(self, state, f"s{len(self.opened)}")
        self.opened.append(session)
        return session

    def batch_key(self, session: Session) -> Hashable:
        assert isinstance(session, BurstSession)
        return self.key(session)

    def step(self, sessions: Sequence[Session], on_stage: StageTimer) -> list[list[Any]]:
        self.check_thread()
        began = time.monotonic()
        if self.gate is not None:
            self.at_gate = True
            self.gate.wait(10)
        if self.delay:
            time.sleep(self.delay)
        bursts = [session for session in sessions if isinstance(session, BurstSession)]
        assert len(bursts) <= self.max_batch
        if len(self.batches) < 1000:  # the engine of the memory tests must not grow itself
            self.batches.append([session.label for session in bursts])
        if len(bursts) > 1 and self.break_batches:
            self.break_batches -= 1
            raise RuntimeError("batched step broke")
        for session in bursts:
            frame = session.pending[: session.size]
            if len(bursts) > 1 and np.any(frame == np.float32(POISON)):
                raise RuntimeError("poisoned batch")
        events = [session.advance() for session in bursts]
        on_stage("encoder", time.monotonic() - began, len(bursts))
        return events


def tone(seconds: float, rate: int = 16000, level: float = 0.5) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (level * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def quiet(seconds: float, rate: int = 16000) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(round(seconds * rate), np.float32)


def pcm16(samples: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()
