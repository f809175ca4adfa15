"""Writing rows of a cache in place, in eager mode and in exported graphs alike (ours)."""

from __future__ import annotations

import torch
from torch import Tensor


def write_rows(cache: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Write values [n, ...] to rows [n] of a cache.

    Exported as ScatterND, which runtimes do in place where input and output share memory.
    """
    if torch.compiler.is_exporting():
        out: Tensor = torch.ops.aten.index_put(cache, [rows], values)
        return out
    return cache.index_copy_(0, rows, values)
