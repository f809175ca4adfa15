"""An image session: conditions and requests in, images out (ours).

**After a lost connection** the image under way goes on from the session's last checkpoint, and requests that
it does not cover are made again. Conditions are in no checkpoint: those that a request still needs are
uploaded again before it. An image that has come does not come again.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import Any

from realtide_client import image_types as i
from realtide_client import image_wire
from realtide_client import types as t
from realtide_client.link import IMAGE, Request, Target
from realtide_client.receipts import Control
from realtide_client.replay import Entry, Message, ReplayLog
from realtide_client.retry import RetryPolicy
from realtide_client.session import Session
from realtide_client.v1 import image_pb2

_SEED_BITS = 32


class ImageStream(Session[i.ImageEvent, i.ImageInfo]):
    """One image session. Use it as an asynchronous context manager and iterate over its events.

    Args:
        target: Where the server is.
        options: The session's choices. With `resume` those of the checkpoint hold.
        resume: A checkpoint to continue from.
        retry: When to connect again.
        open_timeout: Seconds to wait for the server's first message.
        checkpoint_every: Images between checkpoints; 0: none but those asked for.
    """

    _kind = IMAGE

    def __init__(
        self,
        target: Target,
        options: i.ImageOptions,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_every: int = 1,
    ) -> None:
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be at least 0, not {checkpoint_every}")
        super().__init__(
            target,
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            # The server counts an image as a second.
            checkpoint_interval_ms=1000 * checkpoint_every,
        )
        self._options = image_wire.options_message(options)
        self._model = options.model
        self._names = itertools.count(1)
        self._uploads: dict[str, Request] = {}  # by condition, as long as it is not forgotten
        self._there: set[str] = set()  # conditions that the present connection was given
        self._positions: dict[int, str] = {}  # control of the image at a position of this connection
        self._asked: set[str] = set()  # controls that ask for an image
        self._done: set[str] = set()  # those whose image has come or was called off

    # Input

    async def condition(self, kind: str, data: bytes) -> i.Condition:
        """Give the server an image to guide others; it is sent when a request first needs it.

        Args:
            kind: One of the model's kinds, for example `canny`.
            data: A PNG, JPEG or WebP file.

        Raises:
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream.
        """
        self._check_input()
        condition = i.Condition(f"condition-{next(self._names)}", kind)
        self._uploads[condition.condition_id] = image_wire.upload_request(condition, data)
        return condition

    async def generate(
        self,
        prompt: str,
        *,
        conditions: Sequence[i.Condition | tuple[i.Condition, float]] = (),
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        preview_interval: int = 0,
    ) -> Control:
        """Ask for an image. Its events have the control's `control_id`; `applied` says that it is begun.

        Args:
            prompt: What it shows.
            conditions: Images that guide it, each alone or with a weight.
            width: In pixels; None: the model's.
            height: In pixels; None: the model's.
            steps: Of the sampler; None: the model's.
            guidance: Scale; None: the model's.
            seed: Of the noise; None: one is chosen here, so that a reconnection does not change the image.
            preview_interval: Steps between previews; 0: none.

        Raises:
            ValueError: A condition was forgotten or is another session's.
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream.
        """
        chosen = [one if isinstance(one, tuple) else (one, None) for one in conditions]
        for condition, _ in chosen:
            if condition.condition_id not in self._uploads:
                raise ValueError(f"{condition} is no condition of this session")
        wanted = image_pb2.Generate(
            prompt=prompt,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
            conditions=[
                image_pb2.ImageCondition(condition_id=condition.condition_id, weight=weight)
                for condition, weight in chosen
            ],
            preview_interval=preview_interval,
        )
        control = self._control(lambda name: image_pb2.ImageControl(control_id=name, generate=wanted))
        self._asked.add(control.control_id)
        return control

    async def cancel(self, request: Control) -> Control:
        """Call an image off. `ImageCancelled` follows, unless it was done already."""
        action = image_pb2.CancelImage(control_id=request.control_id)
        return self._control(lambda name: image_pb2.ImageControl(control_id=name, cancel=action))

    # What is the image's own of the session

    def _opening(self) -> Request:
        return image_wire.open_request(self._options, self._model, self._interval_ms)

    def _begin(self, opened: Any) -> tuple[i.ImageInfo, ReplayLog]:
        return image_wire.image_info(opened), ReplayLog(1, 0)

    def _continue(self, opened: Any) -> i.ImageInfo:
        self._buffer.rewind(0)
        self._there.clear()
        for position in [p for p in self._positions if p > opened.session.position]:
            del self._positions[position]
        return image_wire.image_info(opened)

    def _requests(self, entry: Entry) -> Sequence[Request]:
        """A request behind the conditions that it needs and that the connection has not been given."""
        if not isinstance(entry, Message):
            raise TypeError("an image session sends no media in pieces")
        request = entry.request
        needed: list[str] = []
        if isinstance(request, image_pb2.ImageStreamRequest) and request.HasField("control"):
            names = [one.condition_id for one in request.control.generate.conditions]
            needed = [name for name in dict.fromkeys(names) if name not in self._there]
        self._there.update(needed)
        return [*(self._uploads[name] for name in needed), request]

    def _cover(self, checkpoint: t.Checkpoint) -> None:
        self._buffer.cover(0)

    def _on_applied(self, control_id: str, position: int) -> None:
        self._positions[position] = control_id

    def _item(self, response: Any, arrived: float) -> i.ImageEvent | None:
        match response.WhichOneof("message"):
            case "image":
                return image_wire.image(response.image, self.info, arrived)
            case "preview":
                told = response.preview
                return image_wire.preview(told, self._of(told.position), self.info, arrived)
            case "progress":
                step = response.progress
                return i.Progress(self._of(step.position), step.step, step.steps)
            case "conditions_ready":
                ready = response.conditions_ready
                return i.ConditionsReady(self._of(ready.position), ready.hits, ready.misses, ready.seconds)
            case "cancelled":
                return i.ImageCancelled(response.cancelled.control_id)
        return None

    def _is_new(self, item: i.ImageEvent) -> bool:
        if item.control_id in self._done:
            return False
        if isinstance(item, i.Image | i.ImageCancelled):
            self._done.add(item.control_id)
            # Whatever the last checkpoint says of it: it need not be made again.
            self._buffer.forget(item.control_id)
        return True

    def _complete(self) -> bool:
        return self._finishing and self._asked <= self._done

    def _of(self, position: int) -> str:
        return self._positions.get(position, "")
