"""How the server's own threads share processors with engines that are processes of their own (ours)."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

log = logging.getLogger(__name__)


def usable() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leave(count: int) -> frozenset[int]:
    """Keep this process, all its threads, off `count` of its processors, as far as one is left.

    For engines that are processes of their own: a message that wakes the event loop must not take the
    processor away from a step while another one is free in a moment. They may use all processors, and the
    scheduler finds those where nobody else is. Does nothing where affinity does not exist, or for no engine.

    For the same reason its threads preempt nobody when they wake up (the policy that Linux calls batch): who
    is preempted, a client on this machine for example, would go and take the step's processor.

    Returns:
        The processors that are left to others.
    """
    if count < 1 or not hasattr(os, "sched_setaffinity"):
        return frozenset()
    mine = sorted(os.sched_getaffinity(0))
    left = frozenset(mine[max(len(mine) - count, 1) :])
    if left:
        _every_thread("affinity", lambda thread: os.sched_setaffinity(thread, set(mine) - left))
        _every_thread(
            "policy", lambda thread: os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        )
    return left


def _every_thread(what: str, change: Callable[[int], None]) -> None:
    """Change the threads that exist; later ones inherit it. Where it is forbidden that is logged."""
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                change(int(thread))
    except OSError as error:
        log.warning("processors are shared with engines, %s cannot be set: %s", what, error)
