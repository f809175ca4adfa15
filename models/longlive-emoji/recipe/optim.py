"""Muon for matrices, AdamW for the rest (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982).

Muon takes the momentum's nearest orthogonal matrix for a step, so that every direction of a weight moves
alike. Convolutions count as matrices [out, everything else].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with all singular values 1: five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.T


class Muon:
    """Steps named parameters: matrices by Muon, others and those in `plain` by AdamW.

    Args:
        named: parameters by name.
        rate: learning rate of AdamW; Muon's step has the root mean square of 0.2 * rate * `ratio`.
        plain: parts of names of matrices that AdamW is to have: tables and the like.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        rate: float,
        *,
        ratio: float = 5.0,
        decay: float = 0.01,
        plain: tuple[str, ...] = (),
    ) -> None:
        self._rate, self._ratio, self._decay = rate, ratio, decay
        self._matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, value in named:
            matrix = value.ndim >= 2 and min(value.shape[0], value[0].numel()) >= 8
            (self._matrices if matrix and not any(part in name for part in plain) else others).append(value)
        self._momentum = [torch.zeros_like(value) for value in self._matrices]
        # AdamW refuses an empty list, and a LoRA is nothing but matrices.
        self._adam = torch.optim.AdamW([{"params": others}], lr=rate, betas=(0.9, 0.98), weight_decay=0.0)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for value in self._matrices:
            value.grad = None
        self._adam.zero_grad()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step; `scale` is the schedule's share of the learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = self._rate * scale
        self._adam.step()
        rate = self._rate * scale * self._ratio
        for value, momentum in zip(self._matrices, self._momentum, strict=True):
            if value.grad is None:
                continue
            momentum.mul_(0.95).add_(value.grad)
            ahead = value.grad + 0.95 * momentum
            flat = orthogonal(ahead.flatten(1).float())
            size = 0.2 * max(flat.shape) ** 0.5
            value.mul_(1 - rate * self._decay).add_(flat.reshape(value.shape), alpha=-rate * size)
