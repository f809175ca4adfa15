"""Give a trained transformer more layers that change nothing yet (ours).

    deepen.py --begin model.pt --out deeper.pt --after 1 2

A new layer stands behind each of the layers named: a copy of it whose three branches add zero. What was
learned is kept, and the copy's sharp queries and keys are a start for the new ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

SILENT = ("self_attn.o.", "cross_attn.o.", "ffn.2.")
"""Last projections of the branches."""


def deepen(weights: dict[str, Tensor], after: list[int]) -> dict[str, Tensor]:
    """Weights of a transformer with a silent copy behind each layer of `after`."""
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if any(not 0 <= layer < layers for layer in after):
        raise ValueError(f"--after must name layers 0..{layers - 1}, got {after}")
    order = [(layer, new) for layer in range(layers) for new in [False] + [True] * after.count(layer)]
    found = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for place, (layer, new) in enumerate(order):
        head = f"blocks.{layer}."
        for name, value in weights.items():
            if name.startswith(head):
                rest = name.removeprefix(head)
                silent = new and rest.startswith(SILENT)
                found[f"blocks.{place}.{rest}"] = torch.zeros_like(value) if silent else value.clone()
    return found


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--begin", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--after", type=int, nargs="+", required=True, help="layers of the given transformer")
    args = parse.parse_args()
    parts = torch.load(args.begin, weights_only=True)["weights"]
    torch.save({"weights": {**parts, "transformer": deepen(parts["transformer"], args.after)}}, args.out)


if __name__ == "__main__":
    main()
