"""A pool of the training clips as they are, and digit strings of them: what training starts on (ours).

Alignments are found an order of magnitude sooner on clean speech; the augmented pool of prepare.py takes
over from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data import read_prompts, read_tables
from pool import PoolWriter
from prepare import digit_strings, single
from render import features_of


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech", type=Path, required=True, help="folder with the speech tables")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--strings", type=int, default=1500, help="digit strings to make")
    parser.add_argument(
        "--doubles", type=int, default=0, help="more of them, in which digits often come twice"
    )
    args = parser.parse_args()
    clips = [u for u in [*read_tables(args.speech), *read_prompts(wide=True)[0]] if u.split == "train"]
    takes = [u for u in clips if u.set == "fsdd"]
    plain = digit_strings(takes, args.strings, seed=17)
    doubles = digit_strings(takes, args.doubles, seed=18, repeats=0.3)
    with PoolWriter(args.out) as writer:
        for record, wave in [*single(clips), *plain, *doubles]:
            writer.add(record, features_of(wave))


if __name__ == "__main__":
    main()
