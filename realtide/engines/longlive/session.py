"""One video session: prompts, credit and pauses in, frames and receipts out (ours).

The session decides what is to be done; `generation.VideoStream` generates latents, `decoding.Decoding` makes
frames of them. All of it runs in the executor's thread but for the decoding itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from realtide.engines.engine import CheckpointMismatch, StageTimer
from realtide.engines.longlive.caches import Cache, CachePool
from realtide.engines.longlive.config import VaeConfig, VideoConfig
from realtide.engines.longlive.decoding import Decoding, FrameWorker
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.timeline import Clock, Timeline
from realtide.engines.longlive.types import (
    Applied,
    Credit,
    Denoised,
    Finish,
    Pause,
    Play,
    PromptApplied,
    SetPrompt,
    VideoEvent,
    VideoInput,
    VideoOptions,
)
from realtide.engines.runtime.memory import Memory
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.slots import SlotLease

Float32 = NDArray[np.float32]
FORMAT = 1


class Notify(Protocol):
    """Whom the engine's worker thread tells what it did; see `engine.Engine.attach`."""

    def wake(self, session: VideoSession) -> None:
        """`session` has something to collect."""
        ...

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """See `engine.StageTimer`."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What the sessions of an engine share."""

    config: VideoConfig
    vae: VaeConfig
    embed: Callable[[str], Float32]
    caches: CachePool[VideoSession]
    worker: FrameWorker
    notify: Notify
    timeline: Timeline

    @property
    def memory(self) -> Memory:
        """Where caches and latents are."""
        return self.worker.memory


@dataclass(frozen=True, slots=True)
class State:
    """An unpacked checkpoint: plain values, the stream's own state, and tensors if caches were kept."""

    plain: Mapping[str, Any]
    stream: bytes
    tensors: Mapping[str, Array] = field(repr=False)


class VideoSession:
    """See `engine.engine.Session`; takes `types.VideoInput` and gives `types.VideoEvent`.

    Args:
        parts: of the engine.
        lease: of the slot; the session frees it.
        options: validated.
        state: of a session to continue.

    Raises:
        CheckpointMismatch: the state does not fit this model; the caller frees the lease.
    """

    def __init__(self, parts: Parts, lease: SlotLease, options: VideoOptions, state: State | None) -> None:
        self._parts = parts
        self._lease = lease
        self._length = options.length
        self._credit = options.credit
        self._paused = False
        self._finishing = False
        self._closed = False
        self._cache: Cache | None = None
        self._pending = [] if state else [SetPrompt("", options.prompt)]
        now = time.monotonic()
        sent = self._sent_of(state) if state else 0
        # The first frame is due a block's time after the session was opened: viewers who wait for their next
        # frame go before those who wait for their first.
        later = parts.config.stream.block * parts.vae.temporal_scale / options.frames_per_second
        rate = options.frames_per_second
        self._clock = Clock(now + later - sent / rate, rate)
        self._decoding = Decoding(
            parts.timeline,
            self._clock,
            parts.worker,
            lambda: parts.notify.wake(self),
            parts.notify.on_stage,
            options.encode,
            options.group,
            sent,
        )
        if state is None:
            any_cache = parts.caches.first
            self._stream = VideoStream(
                parts.config, any_cache.programs, any_cache.keys, options.seed, memory=parts.memory
            )
            self._stream.park()
        else:
            self._stream = self._resume(state)
        self._allow(now)

    # -- what the executor asks ----------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True once the video's length, or after `Finish` the credit, has been handed out."""
        collected = self._decoding.collected
        if self._length is not None and collected >= self._length:
            return True
        return self._finishing and (self._paused or collected >= self._limit)

    @property
    def parked(self) -> bool:
        """See `caches.Holder`: something was generated, and there is no cache."""
        return self._cache is None and self._stream.frames > 0 and not self._closed

    @property
    def waits(self) -> bool:
        """See `caches.Holder`."""
        return self._cache is None and self._has_work()

    @property
    def idle(self) -> bool:
        """See `caches.Holder`: paused, or the credit is used up."""
        return not self._has_work() and self._decoding.idle

    @property
    def at_rest(self) -> bool:
        """See `caches.Holder`."""
        return not self._stream.under_way and self._decoding.idle

    def runnable(self) -> bool:
        """True if a step would get a cache, or work on the block under way or the next one."""
        if not self._has_work():
            return False
        caches = self._parts.caches
        if self._cache is None:
            return caches.available(self)
        return self._stream.under_way or not caches.contested(self)

    def _has_work(self) -> bool:
        """True if a block may be generated, or a cache is needed to decode.

        A block is not begun while the decoder is more than one behind. What was not handed out must also lie
        in the window's latents, from which a resumed session decodes it anew.
        """
        if self._closed or self._paused or self.done:
            return False
        decoding, stream = self._decoding, self._parts.config.stream
        if self._cache is None and decoding.waiting and decoding.sent < self._limit:
            return True
        if self._next_frame >= self._limit or decoding.waiting > stream.block:
            return False
        behind = self._stream.frames - self._parts.timeline.latent(decoding.sent)
        return not behind or behind + stream.block <= stream.window

    def full(self) -> bool:
        """Controls and credit never wait for a step."""
        return False

    def deadline(self) -> float:
        """When the first frame of the next block is due."""
        return self._clock.due(self._next_frame)

    def push(self, item: VideoInput) -> Sequence[VideoEvent]:
        """Take one input."""
        if isinstance(item, Credit):
            self._credit = max(self._credit, item.position)
            self._allow(item.received)
        elif isinstance(item, SetPrompt):
            self._pending.append(item)
        elif isinstance(item, Finish):
            self._finishing = True
        elif isinstance(item, Pause):
            return self._pause(item)
        else:
            return self._play(item)
        return ()

    def collect(self) -> Sequence[VideoEvent]:
        """Frames that were made beside steps. Raises the error that making them ended with."""
        return self._decoding.collect()

    def settle(self) -> Sequence[VideoEvent]:
        """Have the decoding rest until `export` has been called, and hand out all it has made."""
        self._decoding.rest()
        return self._decoding.collect()

    def export(self, *, cache: bool = False) -> bytes:
        """Serialize the session as of the last `settle`; it goes on unchanged.

        Args:
            cache: with the caches a restored session continues bit for bit. Without, the checkpoint is small
                and the caches are made anew: the transformer's by a recache, the decoder's from the
                latents of the window.
        """
        self._decoding.rest()
        try:
            return self._export(cache and self._cache is not None)
        finally:
            self._decoding.resume()

    def park(self) -> None:
        """Give up the caches, which another session takes over; a later step makes them anew."""
        self._stream.park()
        self._decoding.unbind()
        self._cache = None

    def close(self) -> None:
        """Free the slot, once."""
        self._closed = True
        self._decoding.close()
        self._parts.caches.leave(self)
        self._cache = None
        self._lease.free()
        self._parts.notify.wake(self)

    # -- a step --------------------------------------------------------------------------------------------

    def advance(self, on_stage: StageTimer) -> list[VideoEvent]:
        """Do one thing: get a cache, change the prompt, or make one pass over the block."""
        if self._cache is None:
            self._settle_in(on_stage)
            if self._stream.frames:
                return []
        if not self._stream.under_way:
            due = [p for p in self._pending if p.at is None or p.at <= self._next_frame]
            if due:
                return self._switch(due, on_stage)
        begun = time.perf_counter()
        latents = self._stream.advance()
        stage = "denoise" if latents is None else "clean_pass"
        on_stage(stage, time.perf_counter() - begun, 1)
        if latents is None:
            return []
        first, end = (
            self._parts.timeline.first(n) for n in (self._stream.frames - len(latents), self._stream.frames)
        )
        self._decoding.put(latents)
        return [Denoised(first, end - first)]

    def _settle_in(self, on_stage: StageTimer) -> None:
        cache = self._parts.caches.take(self)
        try:
            begun = time.perf_counter()
            self._stream.rebuild(cache.programs, cache.keys)
            if self._stream.frames:
                on_stage("recache", time.perf_counter() - begun, 1)
        except BaseException:
            self._parts.caches.give_back(self)
            self._stream.park()
            raise
        self._cache = cache
        recent = self._stream.recent
        self._decoding.bind(cache.decoder, recent[: len(recent) - self._decoding.waiting])

    def _switch(self, due: Sequence[SetPrompt], on_stage: StageTimer) -> list[VideoEvent]:
        """Follow the last of the prompts that are due; all get their receipt."""
        wanted = due[-1]
        begun = time.perf_counter()
        text = self._parts.embed(wanted.prompt)
        embedded = time.perf_counter()
        on_stage("text", embedded - begun, 1)
        replayed = self._stream.set_prompt(text)
        seconds = time.perf_counter() - embedded if replayed else 0.0
        if replayed:
            on_stage("recache", seconds, 1)
        self._pending = [p for p in self._pending if p not in due]
        first = self._next_frame
        self._decoding.mark(PromptApplied(wanted.control_id, wanted.prompt, first, seconds, replayed))
        return [Applied(p.control_id, first) for p in due if p.control_id]

    # -- inputs --------------------------------------------------------------------------------------------

    @property
    def _next_frame(self) -> int:
        """First frame of the block under way, or of the next one."""
        return self._parts.timeline.first(self._stream.frames)

    @property
    def _limit(self) -> int:
        return self._credit if self._length is None else min(self._credit, self._length)

    def _allow(self, when: float) -> None:
        if not self._paused:
            self._decoding.allow(self._limit, when)

    def _pause(self, item: Pause) -> list[VideoEvent]:
        self._decoding.rest()
        self._paused = True
        self._decoding.allow(self._decoding.sent, time.monotonic())
        events = self._decoding.collect()
        self._decoding.resume()
        self._parts.notify.wake(self)
        return [*events, Applied(item.control_id, self._decoding.sent)]

    def _play(self, item: Play) -> list[VideoEvent]:
        now = time.monotonic()
        if self._paused:
            self._paused = False
            self._clock.came(self._decoding.sent, now)
            self._allow(now)
        return [Applied(item.control_id, self._decoding.sent)]

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _export(self, cache: bool) -> bytes:
        sent = self._decoding.sent
        plain: dict[str, Any] = {
            "format": FORMAT,
            "sent": sent,
            "paused": self._paused,
            "marks": [asdict(mark) for mark in self._decoding.marks],
            "pending": [asdict(p) for p in self._pending if not p.control_id],
            "ran": None,
        }
        tensors: dict[str, Array] = {}
        if cache and self._cache is not None:
            ran, held = self._decoding.taken()
            if ran or not self._stream.frames:
                plain["ran"] = ran
                get = self._parts.memory.get
                tensors = {name: get(values) for name, values in self._cache.features.items()}
                tensors["held"] = _no_frames() if held is None else held
        tensors["stream"] = np.frombuffer(self._stream.export(cache=bool(tensors)), np.uint8)
        return save_tensors(tensors, {"session": json.dumps(plain)})

    def _sent_of(self, state: State) -> int:
        try:
            sent = int(state.plain["sent"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
        if sent < 0:
            raise CheckpointMismatch(f"checkpoint is damaged: {sent} frames sent")
        return sent

    def _resume(self, state: State) -> VideoStream:
        parts = self._parts
        plain, decoding = state.plain, self._decoding
        try:
            ran = plain["ran"]
            marks = [PromptApplied(**mark) for mark in plain["marks"]]
            self._pending = [SetPrompt(**prompt) for prompt in plain["pending"]]
            self._paused = bool(plain["paused"])
            held = _no_frames() if ran is None else state.tensors["held"].astype(np.uint8, casting="no")
            for name, own in parts.caches.first.features.items():
                if ran is not None and state.tensors[name].shape != tuple(own.shape):
                    raise ValueError(f"{name} is {list(state.tensors[name].shape)}, not {list(own.shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
        cache = parts.caches.first if ran is None else parts.caches.take(self)
        try:
            stream = VideoStream.resume(
                parts.config, cache.programs, cache.keys, state.stream, memory=parts.memory
            )
            waiting = stream.frames - parts.timeline.latent(decoding.sent) - bool(len(held))
            if not 0 <= waiting <= len(stream.recent):
                raise CheckpointMismatch(f"checkpoint is damaged: {waiting} latent frames to decode")
        except BaseException:
            parts.caches.give_back(self)
            raise
        if ran is not None:
            for name, own in cache.features.items():
                parts.memory.fill(own, state.tensors[name])
            parts.memory.wait()  # the worker's thread goes on with them
            self._cache = cache
            decoding.adopt(cache.decoder, int(ran), held)
        for mark in marks:
            decoding.mark(mark)
        decoding.put(stream.recent[len(stream.recent) - waiting :])
        return stream


def unpack(checkpoint: bytes) -> State:
    """Read an exported session. Raises CheckpointMismatch."""
    try:
        size = int.from_bytes(checkpoint[:8], "little")
        plain = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["session"])
        tensors = load_tensors(checkpoint)
        stream = tensors.pop("stream").tobytes()
        known = plain["format"]
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
    if known != FORMAT:
        raise CheckpointMismatch(f"checkpoint has format {known}, this program reads {FORMAT}")
    return State(plain, stream, tensors)


def _no_frames() -> NDArray[np.uint8]:
    return np.zeros((0, 0, 0, 3), np.uint8)
