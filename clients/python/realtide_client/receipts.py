"""Answers that are awaited: the two receipts of controls, and checkpoints that were asked for (ours)."""

from __future__ import annotations

import asyncio
import itertools

from realtide_client import errors
from realtide_client import types as t
from realtide_client.v1 import common_pb2


class Control:
    """A control on its way. Await `accepted()` and `applied()` for its two receipts."""

    def __init__(self, control_id: str) -> None:
        self.control_id = control_id
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[t.Accepted] = loop.create_future()
        self._applied: asyncio.Future[t.Applied] = loop.create_future()

    async def accepted(self) -> t.Accepted:
        """Wait until the server has validated it. Raises what ended the stream, if it ended before."""
        return await asyncio.shield(self._accepted)

    async def applied(self) -> t.Applied:
        """Wait until it has taken effect. Raises what ended the stream, if it ended before."""
        return await asyncio.shield(self._applied)


class Receipts:
    """Everything that a session awaits from its server, over whichever connection it comes."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._controls: dict[str, Control] = {}
        self._checkpoints: dict[str, asyncio.Future[t.Checkpoint]] = {}

    def control(self) -> Control:
        """A new control."""
        control = Control(f"control-{next(self._ids)}")
        self._controls[control.control_id] = control
        return control

    def checkpoint(self) -> tuple[str, asyncio.Future[t.Checkpoint]]:
        """Id and answer of a new request for a checkpoint."""
        key = f"checkpoint-{next(self._ids)}"
        future: asyncio.Future[t.Checkpoint] = asyncio.get_running_loop().create_future()
        self._checkpoints[key] = future
        return key, future

    def on_accepted(self, message: common_pb2.ControlAccepted) -> None:
        """The first receipt of a control has come, perhaps again."""
        control = self._controls.get(message.control_id)
        if control is not None and not control._accepted.done():
            control._accepted.set_result(t.Accepted(message.control_id, message.position))

    def on_applied(self, message: common_pb2.ControlApplied) -> None:
        """The second receipt of a control has come, perhaps again."""
        control = self._controls.pop(message.control_id, None)
        if control is not None and not control._applied.done():
            control._applied.set_result(
                t.Applied(message.control_id, message.position, message.delay_seconds)
            )

    def on_checkpoint(self, request_id: str, checkpoint: t.Checkpoint) -> None:
        """A checkpoint has come; only those that were asked for are awaited."""
        future = self._checkpoints.pop(request_id, None)
        if future is not None and not future.done():
            future.set_result(checkpoint)

    def fail(self, reason: errors.RealtideError) -> None:
        """The session is over: no answer comes any more."""
        waiting: list[asyncio.Future[t.Accepted] | asyncio.Future[t.Applied] | asyncio.Future[t.Checkpoint]]
        waiting = [f for c in self._controls.values() for f in (c._accepted, c._applied)]
        waiting += self._checkpoints.values()
        for future in waiting:
            if not future.done():
                future.set_exception(reason)
                future.exception()  # nobody need wait for it
