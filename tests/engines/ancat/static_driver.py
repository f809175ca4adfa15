"""Drives the static step as `test_stream.Driver` drives the other."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from realtide.engines.ancat.config import static_shapes, threshold
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.stream_static import StaticStep
from tests.engines.ancat.oracle import Dial
from tests.engines.ancat.test_stream import Driver


class StaticDriver(Driver):
    """Calls are filled up with `padding` streams that are nobody's, in the slot after the last."""

    def __init__(
        self, model: Transducer, step_frames: int, slots: int, lanes: int | None = None, padding: int = 2
    ) -> None:
        super().__init__(model, step_frames, slots)
        self.lanes, self.padding, self.slots = lanes or step_frames, padding, slots
        self.step = StaticStep(model.encoder, step_frames, self.lanes)  # type: ignore[assignment]
        self.state = [
            torch.zeros((slots + 1) * rows, *shape, dtype=getattr(torch, dtype))
            for rows, shape, dtype in static_shapes(model.config, step_frames).values()
        ]

    @torch.no_grad()
    def call(self, news: dict[int, Tensor], dials: dict[int, Dial], final: Set[int] = frozenset()) -> None:
        """Feed windows [n, 7, mel] by slot, at most as many as there are lanes at a time."""
        left, active = dict(news), list(news)
        while active:
            now = {slot: left[slot][: self.lanes] for slot in active}
            left = {slot: left[slot][self.lanes :] for slot in active}
            windows = torch.zeros(
                len(active) + self.padding, self.lanes, self.config.window, self.config.mel_bins
            )
            for b, slot in enumerate(active):
                windows[b, : len(now[slot])] = now[slot]
                self.fed[slot] += len(now[slot])
            none = [0] * self.padding
            encoded, available, count, more, *_ = self.step(
                windows,
                torch.tensor([*(len(now[s]) for s in active), *none]),
                torch.tensor([*active, *(self.slots for _ in none)]),
                torch.tensor([*(self.fed[s] for s in active), *none]),
                torch.tensor([*(threshold(dials[s].bias) for s in active), *map(float, none)]),
                torch.tensor([*(dials[s].cap for s in active), *none]),
                torch.tensor([*(int(s in final and not len(left[s])) for s in active), *none]),
                *self.state,
            )
            assert count[len(active) :].tolist() == more[len(active) :].tolist() == none
            for b, slot in enumerate(active):
                self.rows[slot] += list(encoded[b, : count[b]])
                self.available[slot] += available[b, : count[b]].tolist()
                assert not encoded[b, count[b] :].any()
                assert not available[b, count[b] :].any()
            active = [s for b, s in enumerate(active) if more[b] or len(left[s])]
            self.repeats += bool(active)
