"""Processes that make load: a plan on standard input, lines of JSON on standard output (ours).

Load is made in a process of its own, so that neither a progress bar nor the command's own event loop disturbs
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from realtide.cli.errors import CommandError

Tell = Callable[[dict[str, Any]], None]


class Plan(Protocol):
    """What a child is told."""

    def to_json(self) -> str:
        """The plan as text, which the child reads."""
        ...


def serve(work: Callable[[str, Tell], dict[str, Any]]) -> None:
    """In the child: run `work(plan, tell)` and send its result, or the sentence with which it failed."""

    def tell(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    try:
        tell({"event": "result", "result": work(sys.stdin.read(), tell)})
    except Exception as error:
        # The sentence goes to the user, the rest to standard error, for whoever has to look closer.
        import traceback

        traceback.print_exc()
        tell({"event": "error", "message": f"{error}" or repr(error)})


async def run(module: str, plan: Plan, on_event: Callable[[str, int], Awaitable[None]]) -> dict[str, Any]:
    """Run `python -m module` with `plan`; `on_event(name, pid)` hears of "begin" and "end" when they happen.

    Returns:
        The child's result.

    Raises:
        CommandError: It failed; the message has its sentence, or its last words.
    """
    with tempfile.TemporaryFile("w+b") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        try:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the child's pipes are not connected")
            process.stdin.write(plan.to_json().encode())
            process.stdin.close()
            while line := await process.stdout.readline():
                message = json.loads(line)
                if message["event"] == "result":
                    result: dict[str, Any] = message["result"]
                    return result
                if message["event"] == "error":
                    raise CommandError(message["message"])
                await on_event(message["event"], process.pid)
            await process.wait()
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip().splitlines()
            raise CommandError(f"{module} ended early: {words[-1] if words else process.returncode}")
        except BaseException:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            raise
        finally:
            await process.wait()
