"""Linear layers over one input made into one (ours): a GPU reads the input once and launches one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fused(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose output is that of `layers`, all of one input width, side by side.

    Raises:
        ValueError: they differ in their input's width, or some have a bias and some have none.
    """
    first = layers[0]
    if any(layer.in_features != first.in_features for layer in layers):
        raise ValueError("layers of different inputs cannot be fused")
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        raise ValueError("either all layers to be fused have a bias or none has")
    with torch.device("meta"):
        made = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bool(biases))
    with torch.no_grad():
        made.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if biases:
            made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return made
