"""LoRAs of conditions: from the release's names to what the condition pass takes (EasyControl's release).

A LoRA file has, for each block's attention and each of its projections, ``down`` [rank, D] and ``up``
[D, rank]; its network alpha equals its rank, so that a weight of 1 adds ``up(down(x))``. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from realtide.engines.easycontrol.config import TransformerConfig
from realtide.engines.runtime.program import Array

PARTS = ("q", "k", "v", "proj")


def names(config: TransformerConfig, number: int = 0) -> Iterator[tuple[int, int, str]]:
    """The tensors of a LoRA without their last part: block, projection, name up to ``.down.weight``.

    Args:
        config: of the transformer.
        number: of the LoRA, as in ``q_loras.0``.
    """
    for block in range(config.blocks):
        double = block < config.double_blocks
        kind = "transformer_blocks" if double else "single_transformer_blocks"
        index = block if double else block - config.double_blocks
        for part, name in enumerate(PARTS[: 4 if double else 3]):
            yield block, part, f"{kind}.{index}.attn.processor.{name}_loras.{number}"


def stacked(
    config: TransformerConfig, weights: Mapping[str, Array], weight: float, prefix: str = ""
) -> dict[str, Array]:
    """The inputs of the condition pass (`config.lora_shapes`) for a LoRA of some weight.

    Args:
        config: of the transformer.
        weights: tensors by the release's names, behind `prefix`.
        weight: of the LoRA.
        prefix: of the names.

    Raises:
        KeyError: a tensor is missing.
    """
    found: dict[str, list[Array]] = {}
    for block, _, name in names(config):
        for kind in ("down", "up"):
            tensor = np.asarray(weights[f"{prefix}{name}.{kind}.weight"], np.float32)
            found.setdefault(f"{kind}_{block}", []).append(tensor)
    return {
        name: np.stack(parts) * np.float32(weight if name.startswith("up") else 1.0)
        for name, parts in found.items()
    }
