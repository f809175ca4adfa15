"""When to connect again: exponential back-off with full jitter, never sooner than the server asks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from realtide_client.errors import RealtideError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently to connect again.

    Attributes:
        max_retries: Connections tried in a row, after the first, without anything gained; 0: never reconnect.
        initial_seconds: Upper end of the first delay.
        multiplier: Growth of the upper end from one delay to the next.
        max_seconds: Highest upper end.
        random: Gives numbers in [0, 1); replaceable for tests.
    """

    max_retries: int = 6
    initial_seconds: float = 0.1
    multiplier: float = 2.0
    max_seconds: float = 10.0
    random: Callable[[], float] = random.random

    def delay(self, failures: int, error: RealtideError) -> float | None:
        """Seconds to wait before the next try, or None if `error` is to be raised instead.

        Full jitter spreads clients that lost the same server. A delay that the server asked for (RetryInfo)
        is a lower bound, with the jitter on top, for the same reason.

        Args:
            failures: Tries in a row that have failed before this one.
            error: What has just gone wrong.
        """
        if failures >= self.max_retries or not error.reconnectable:
            return None
        upper = min(self.max_seconds, self.initial_seconds * self.multiplier**failures)
        return (error.retry_after or 0.0) + self.random() * upper
