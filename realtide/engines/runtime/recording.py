"""Some calls of a program, kept with the state before them, to run other graphs on the same (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from realtide.engines.runtime.program import Array, Program
from realtide.engines.runtime.quality import Sample


class Recorded:
    """A program that keeps its calls number 1, 2, 4, 8 and so on: some early ones, some late ones.

    Args:
        program: what runs.
        state: its state arrays.

    Attributes:
        samples: the calls kept so far, each with copies of what it was fed and of the state before it.
    """

    def __init__(self, program: Program, state: Mapping[str, Array]) -> None:
        self._program, self._state = program, state
        self._calls = 0
        self.samples: list[Sample] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Program.run`."""
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            copies = [
                {name: np.array(array) for name, array in given.items()} for given in (feeds, self._state)
            ]
            self.samples.append(Sample([copies[0]], copies[1]))
        return self._program.run(feeds)


def shortened(prompt: str, count: Callable[[str], int], limit: int) -> str:
    """As many of an example's words as a model takes: at most `limit` tokens, as `count` counts them."""
    words = prompt.split()
    while words and count(" ".join(words)) > limit:
        words.pop()
    return " ".join(words)
