"""Scale attention scores of a checkpoint back to a sane spread (ours).

    cool.py --checkpoint RUN/last.pt --audio FOLDER --bundle BUNDLE --out RUN/cooled.pt

Nothing in training holds queries and keys: over thousands of steps scores of a row had grown to a standard
deviation of hundreds to thousands. Softmax then picks one frame, no gradient comes back, and rounding is
amplified by as much. Head by head, queries and keys are scaled alike so that scores spread by `--spread` at
most; training goes on from there. FOLDER has recordings (FLAC or WAV); BUNDLE gives the front end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from realtide.bench.encoder import windows_of
from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.model import Block, Encoder
from realtide.engines.ancat.offline import encode, hard_arcs


def spread(block: Block, x: Tensor) -> Tensor:
    """Mean standard deviation of a row's scores in each head [heads]; x [1, T, dim], the block's input."""
    residual, key, _, _ = block.arrive(x)
    queries, keys = (
        value[0].unflatten(-1, (block.heads, -1)).transpose(0, 1) for value in (block.queries(residual), key)
    )
    return (queries @ keys.transpose(1, 2)).std(-1).mean(1)


@torch.no_grad()
def cool(encoder: Encoder, recordings: list[Tensor], limit: float) -> list[list[float]]:
    """Scale every block in place, the first one first; windows [1, T, 7, mel] -> spreads before, by layer."""
    found = []
    for layer, module in enumerate(encoder.blocks):
        block: Block = module  # type: ignore[assignment]
        each = []
        for windows in recordings:
            lengths = torch.tensor([windows.shape[1]])
            each.append(
                spread(block, encode(encoder, windows, lengths, hard_arcs(encoder.config), tap=layer).tapped)
            )
        before = torch.stack(each).mean(0)
        factor = (limit / before).clamp(max=1).sqrt().repeat_interleave(encoder.config.head_dim)
        for linear in (block.query, block.key):
            linear.weight.mul_(factor.unsqueeze(1))
            linear.bias.mul_(factor)
        found.append([round(value, 1) for value in before.tolist()])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spread", type=float, default=1.5)
    args = parser.parse_args()
    saved = torch.load(args.checkpoint, weights_only=True)
    encoder = Encoder(EncoderConfig.from_dict(saved["config"])).eval()
    encoder.load_state_dict(
        {
            name.removeprefix("encoder."): value
            for name, value in saved["weights"].items()
            if name.startswith("encoder.")
        }
    )
    recordings = []
    for path in sorted(args.audio.glob("*.flac")) + sorted(args.audio.glob("*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        recordings.append(torch.from_numpy(windows_of(samples, rate, args.bundle, 1)))
    if not recordings:
        parser.error(f"{args.audio} has no FLAC or WAV files")
    for layer, values in enumerate(cool(encoder, recordings, args.spread)):
        print(f"block {layer + 1}: scores spread by {values}")
    weights = saved["weights"] | {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"weights": weights, "config": saved["config"]}, args.out)


if __name__ == "__main__":
    main()
