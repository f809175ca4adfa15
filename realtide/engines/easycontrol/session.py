"""One image session: conditions and requests in, progress and images out (ours).

A session makes one image at a time, in the order in which they were asked for; decoding and encoding of one
overlap the steps of the next.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from realtide.engines.easycontrol.parts import Parts, Row
from realtide.engines.easycontrol.request import Held, Request, state_of
from realtide.engines.easycontrol.types import (
    Applied,
    Cancel,
    Cancelled,
    Condition,
    Forget,
    Generate,
    Image,
    ImageEvent,
    ImageInput,
    ImageOptions,
    Pixels8,
    Preview,
    Progress,
)
from realtide.engines.easycontrol.worker import Outbox
from realtide.engines.engine import CheckpointMismatch, StageTimer
from realtide.engines.runtime.slots import SlotLease

Float32 = NDArray[np.float32]
FORMAT = 1
_DECODING = 2
"""Images of a session that may wait for the worker before it begins no further step."""


class Notify(Protocol):
    """Whom sessions tell that something changed; see `engine.Engine.attach`."""

    def wake(self, session: ImageSession) -> None:
        """`session` has something to collect; from any thread."""
        ...

    def freed(self) -> None:
        """Memory of the condition cache is held no longer."""
        ...

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """See `engine.StageTimer`; from any thread."""
        ...


@dataclass(frozen=True, slots=True)
class State:
    """An unpacked checkpoint: plain values, and the tensors of the image under way."""

    plain: Mapping[str, Any]
    tensors: Mapping[str, NDArray[np.generic]] = field(repr=False)


class ImageSession:
    """See `engine.engine.Session`; takes `types.ImageInput` and gives `types.ImageEvent`.

    Args:
        parts: of the engine.
        notify: the engine.
        lease: of the slot; the session frees it.
        options: validated.
        latency: seconds after which a step is due.
        state: of a session to continue.

    Raises:
        CheckpointMismatch: the state does not fit this model; the caller frees the lease.
    """

    def __init__(
        self,
        parts: Parts,
        notify: Notify,
        lease: SlotLease,
        options: ImageOptions,
        latency: float,
        state: State | None,
    ) -> None:
        self._parts, self._notify, self._lease = parts, notify, lease
        self._options, self._latency = options, latency
        self._conditions: dict[str, Held] = {}
        self._queue: deque[Request] = deque()
        self._next = options.start
        self._finishing = False
        self._closed = False
        self._due = time.monotonic() + latency
        self._outbox = Outbox(parts.worker, lambda: notify.wake(self))
        if state is not None:
            self._resume(state)

    # -- what the executor asks ----------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True once all images were handed out, after `Finish`."""
        return self._finishing and not self._queue and self._outbox.idle

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    @property
    def current(self) -> Request | None:
        """The image under way, or the next one."""
        return self._queue[0] if self._queue else None

    def runnable(self) -> bool:
        """True if the image under way can go on."""
        current = self.current
        if self._closed or current is None or self._outbox.waiting > _DECODING:
            return False
        return not current.waits

    def full(self) -> bool:
        """Requests never wait for a step."""
        return False

    def deadline(self) -> float:
        """A while after the last step: sessions take turns."""
        return self._due

    def push(self, item: ImageInput) -> Sequence[ImageEvent]:
        """Take one input."""
        if isinstance(item, Condition):
            self._conditions[item.condition_id] = Held(item.kind, item.pixels)
        elif isinstance(item, Forget):
            self._conditions.pop(item.condition_id, None)
            return [Applied(item.control_id, self._next)]
        elif isinstance(item, Generate):
            chosen = [(self._conditions[name], weight) for name, weight in item.conditions]
            if not self._queue:
                self._due = time.monotonic() + self._latency
            self._queue.append(Request(self._parts, item, self._next, chosen))
            self._next += 1
        elif isinstance(item, Cancel):
            return self._cancel(item)
        else:
            self._finishing = True
        return ()

    def collect(self) -> Sequence[ImageEvent]:
        """Pictures that were made beside steps. Raises the error that making them ended with."""
        return self._outbox.collect()

    def settle(self) -> Sequence[ImageEvent]:
        """Wait for the worker and hand out all it has made."""
        return self._outbox.settle()

    def export(self) -> bytes:
        """Serialize the session as of the last `settle`; it goes on unchanged.

        The image under way is in it with its latents and condition images; requests that were not begun and
        conditions for later ones are not: a client that resumes sends them again.
        """
        self._outbox.settle()
        plain: dict[str, Any] = {"format": FORMAT, "image": None}
        tensors: dict[str, NDArray[np.generic]] = {"none": np.zeros(1, np.uint8)}
        current = self.current
        if current is not None and current.begun:
            plain["image"], held = state_of(current)
            tensors |= held
        return save_tensors(tensors, {"session": json.dumps(plain)})

    def close(self) -> None:
        """Free the slot, once, and all that the session holds."""
        self._closed = True
        self._outbox.close()
        for request in self._queue:
            request.close()
        self._queue.clear()
        self._conditions.clear()
        self._lease.free()
        self._notify.freed()

    # -- a step --------------------------------------------------------------------------------------------

    def begin(self) -> list[ImageEvent]:
        """The receipt of the image under way, if it is its first step."""
        current = self.current
        if current is None or current.begun:
            return []
        current.begun = True
        return [Applied(current.wanted.control_id, current.position)]

    def prepare(self, on_stage: StageTimer) -> list[ImageEvent]:
        """Do one thing before the steps of the image under way."""
        current = self._under_way()
        self._due = time.monotonic() + self._latency
        told = current.prepare(on_stage)
        return [] if told is None else [told]

    def row(self) -> Row:
        """Its part of the next step."""
        return self._under_way().row()

    def advance(self, velocity: Float32) -> list[ImageEvent]:
        """Take a step with its predicted velocity [tokens, channels]."""
        current = self._under_way()
        self._due = time.monotonic() + self._latency
        clean = current.advance(velocity)
        wanted, step = current.wanted, current.step
        if wanted.preview_interval and step % wanted.preview_interval == 0 and not current.done:
            self._outbox.submit(lambda: self._preview(current, step, clean))
        if current.done:
            self._queue.popleft()
            current.close()
            self._notify.freed()
            self._outbox.submit(lambda: self._image(current))
        return [Progress(current.position, step, wanted.steps)]

    def _under_way(self) -> Request:
        current = self.current
        if current is None:
            raise ValueError("no image is under way")
        return current

    # -- worker's thread -----------------------------------------------------------------------------------

    def _preview(self, request: Request, step: int, clean: Float32) -> Preview:
        begun = time.perf_counter()
        pixels = self._parts.preview(clean, request.grid)
        self._notify.on_stage("preview", time.perf_counter() - begun, 1)
        height, width = pixels.shape[:2]
        data = self._encoded(pixels)
        return Preview(request.position, step, width, height, data, request.wanted.received)

    def _image(self, request: Request) -> Image:
        if request.latents is None:
            raise ValueError("the image has no latents")
        begun = time.perf_counter()
        pixels = self._parts.decode(request.latents, request.grid)
        self._notify.on_stage("vae", time.perf_counter() - begun, 1)
        wanted = request.wanted
        height, width = pixels.shape[:2]
        data = self._encoded(pixels)
        return Image(request.position, wanted.control_id, width, height, wanted.seed, data, wanted.received)

    def _encoded(self, pixels: Pixels8) -> Any:
        return pixels if self._options.encode is None else self._options.encode(pixels)

    # -- inputs --------------------------------------------------------------------------------------------

    def _cancel(self, item: Cancel) -> list[ImageEvent]:
        for request in self._queue:
            if request.wanted.control_id == item.target:
                self._queue.remove(request)
                request.close()
                self._notify.freed()
                # A control that was accepted gets its second receipt, whatever becomes of it.
                first = [] if request.begun else [Applied(item.target, request.position)]
                return [
                    *first,
                    Applied(item.control_id, request.position),
                    Cancelled(request.position, item.target),
                ]
        return [Applied(item.control_id, self._next)]

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _resume(self, state: State) -> None:
        image = state.plain["image"]
        if image is None:
            return
        parts = self._parts
        try:
            kinds = [(str(kind), float(weight)) for kind, weight in image["conditions"]]
            size = parts.config.conditions.size
            conditions = []
            for number, (kind, weight) in enumerate(kinds):
                parts.config.conditions.role(kind)
                pixels = state.tensors[f"condition.{number}"].astype(np.uint8, casting="no")
                if pixels.shape != (size, size, 3):
                    raise ValueError(f"a condition is {list(pixels.shape)}")
                conditions.append((Held(kind, pixels), weight))
            wanted = Generate(
                control_id=str(image["control_id"]),
                prompt=str(image["prompt"]),
                width=int(image["width"]),
                height=int(image["height"]),
                steps=int(image["steps"]),
                guidance=float(image["guidance"]),
                seed=int(image["seed"]),
                preview_interval=int(image["preview_interval"]),
                received=time.monotonic(),
            )
            request = Request(parts, wanted, int(image["position"]), conditions)
            step = int(image["step"])
            if not 0 <= step < wanted.steps or request.position != self._options.start:
                raise ValueError(f"step {step} of image {request.position}")
            if step:
                shape = request.grid[0] * request.grid[1], parts.config.transformer.channels
                latents = state.tensors["latents"].astype(np.float32, casting="no")
                if latents.shape != shape:
                    raise ValueError(f"latents are {list(latents.shape)}, not {list(shape)}")
                request.latents, request.step = latents, step
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
        request.begun = True
        self._queue.append(request)
        self._next = request.position + 1


def unpack(checkpoint: bytes) -> State:
    """Read an exported session. Raises CheckpointMismatch."""
    try:
        size = int.from_bytes(checkpoint[:8], "little")
        plain = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["session"])
        tensors = load_tensors(checkpoint)
        known, _ = plain["format"], plain["image"]
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
    if known != FORMAT:
        raise CheckpointMismatch(f"checkpoint has format {known}, this program reads {FORMAT}")
    return State(plain, tensors)
