"""A pool that has some sets of another one: a new index over the same features, nothing is copied (ours).

    select_sets.py --pool DATA/pool1 --without asterisk --out DATA/B

A training step draws one of its pools, so pools of single sets decide how often each is heard.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--only", nargs="+", help="sets to keep")
    which.add_argument("--without", nargs="+", help="sets to leave out")
    args = parser.parse_args()
    lines = (args.pool / "index.jsonl").read_text(encoding="utf-8").splitlines()
    sets = [json.loads(line)["set"] for line in lines]
    unknown = set(args.only or args.without) - set(sets)
    if unknown:
        parser.error(f"{args.pool} has no set {sorted(unknown)[0]!r}, only {', '.join(sorted(set(sets)))}")
    kept = [
        line
        for line, name in zip(lines, sets, strict=True)
        if (name in args.only if args.only else name not in args.without)
    ]
    args.out.mkdir(parents=True)
    for path in args.pool.iterdir():
        if path.name != "index.jsonl":
            (args.out / path.name).symlink_to(path.resolve())
    (args.out / "index.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


if __name__ == "__main__":
    main()
