"""A checkpoint to train on from, out of a bundle's weights (ours).

    warm.py --bundle models/ancat-commands-en --right 15 --out RUN/start.pt --cmvn RUN/cmvn.npy

Schedulers and position biases are widened to `right` frames: a farther arc starts as the farthest known one.
The CTC head is not in a bundle and starts at random. `cmvn.npy` is what the bundle normalises features with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from realtide.bundle import load_bundle
from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.model import Transducer
from realtide.engines.runtime.weights import WeightFile


def widened(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`value` with its last slice repeated along the axes on which `shape` is larger.

    Raises ValueError if it is smaller on one.
    """
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if want < have:
            raise ValueError(f"cannot narrow {tuple(value.shape)} to {tuple(shape)}")
        last = value.narrow(axis, have - 1, 1)
        value = torch.cat([value, *[last] * (want - have)], axis)
    return value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--right", type=int, default=15, help="most frames a layer may look ahead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cmvn", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    bundle = load_bundle(args.bundle)
    stored = WeightFile(bundle.weights)
    encoder = bundle.manifest.architecture["encoder"]
    torch.manual_seed(args.seed)
    model = Transducer(EncoderConfig.from_dict(encoder | {"right": args.right, "rule": "adaptive"}))
    weights = {
        name: value
        if name.startswith("ctc.")
        else widened(torch.from_numpy(np.asarray(stored[name], np.float32)), value.shape)
        for name, value in model.state_dict().items()
    }
    torch.save({"weights": weights, "config": model.config.to_dict()}, args.out)
    np.save(args.cmvn, np.stack([np.asarray(stored[f"features.{name}"]) for name in ("mean", "std")]))


if __name__ == "__main__":
    main()
