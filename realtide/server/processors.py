"""Which processors the server itself uses (ours)."""

from __future__ import annotations

import logging
import os

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
    scheduler finds those where nobody else is. Does nothing where affinity does not exist.

    Returns:
        The processors that are left to others.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    mine = sorted(os.sched_getaffinity(0))
    left = frozenset(mine[max(len(mine) - count, 1) :])
    if left:
        try:
            # Threads that exist; later ones inherit it from those.
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), set(mine) - left)
        except OSError as error:  # forbidden here, or a thread has ended
            log.warning("processors cannot be left to engines: %s", error)
    return left
