"""A small real module with two caches, a data-dependent output and weights used twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realtide.engines.runtime.export import ExportedProgram

WIDTH, ROWS = 16, 21


class Cell(nn.Module):
    """Writes rows of two caches in place, then emits the rows of one that a mask picks."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("table", torch.randn(7, WIDTH))

    def forward(
        self, x: Tensor, token: Tensor, rows: Tensor, mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From x [n, W], token [n], rows [n], mask [m], caches [R, W] to y [k, W], picked [k], new caches."""
        x = self.norm(torch.relu(self.mix(x)) + self.embed(token))
        k, v = self.wide(x[None])[0].chunk(2, dim=-1)
        keys.index_put_((rows,), k)
        values.index_put_((rows,), v)
        picked = torch.nonzero(mask)[:, 0]
        attended = torch.softmax(keys[picked] @ self.table.t(), dim=-1) @ self.table
        return self.mix(attended) + values[picked], picked, keys, values


@dataclass(frozen=True)
class Exported:
    """The module, what was exported from it, and where it lies."""

    module: Cell
    graph: Path
    weights: Path
    program: ExportedProgram


def feeds(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for `count` rows."""
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((count, WIDTH)).astype(np.float32),
        "token": random.integers(0, 5, count),
        "rows": random.permutation(ROWS)[:count],
        "mask": random.random(ROWS) < 0.5 * (count > 0),
    }


def state() -> dict[str, np.ndarray]:
    """Zero caches."""
    return {name: np.zeros((ROWS, WIDTH), np.float32) for name in ("keys", "values")}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The same as torch tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


DYNAMIC = {
    "x": {0: "n"},
    "token": {0: "n"},
    "rows": {0: "n"},
    "mask": {0: "m"},
    "keys": {0: "R"},
    "values": {0: "R"},
}
