"""Write evaluate.py's figures into the model card's tables, so that nobody copies them by hand (ours).

card.py --scores scores.json --card models/longlive-emoji/README.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"


def percent(value: float) -> str:
    """A share as percent with one decimal."""
    return f"{100 * value:.1f} %"


def tables(scores: dict[str, Any]) -> str:
    """The card's section of figures."""
    real, follow, switch, long = (scores[name] for name in ("real", "follow", "switch", "long"))
    lines = [
        "| Held-out triples | |",
        "|---|---|",
        f"| triples, four blocks each | {follow['triples']} |",
        f"| every block shows the prompt's motion | {percent(follow['every_block_right'])} |",
        f"| blocks that show it | {percent(follow['blocks_right'])} |",
        f"| last frame shows the prompt's object | {percent(follow['object_right'])} |",
        f"| last frame shows the prompt's background | {percent(follow['background_right'])} |",
        f"| the judge on {real['blocks']} blocks of real clips | {percent(real['right'])} right |",
        "",
        "| Motion | " + " | ".join(follow["by_motion"]) + " |",
        "|---" * (1 + len(follow["by_motion"])) + "|",
        "| every block right | " + " | ".join(percent(v) for v in follow["by_motion"].values()) + " |",
        "",
        f"| {switch['switches']} prompt switches: cache | recached | kept | dropped |",
        "|---|---|---|---|",
    ]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("new motion in the first block", "new_motion_in_first_block", percent),
        ("new motion in the second block", "new_motion_in_second_block", percent),
        ("old motion in the first block", "old_motion_in_first_block", percent),
        ("centroid's jump at the seam over the clip's median step", "seam_centroid_jump", str),
        ("the same, 90th percentile", "seam_centroid_jump_p90", str),
        ("pixels' change at the seam over the clip's median change", "seam_pixel_jump", str),
        ("the same, 90th percentile", "seam_pixel_jump_p90", str),
    ]
    kinds = ("recache", "kept", "dropped")
    for title, name, form in rows:
        lines.append(f"| {title} | " + " | ".join(form(switch[kind][name]) for kind in kinds) + " |")
    quarters = long["blocks_right_by_quarter"]
    lines += [
        "",
        f"| {long['streams']} streams of {long['blocks']} blocks | 1st quarter | 2nd | 3rd | 4th |",
        "|---|---|---|---|---|",
        "| blocks that show the prompt's motion | " + " | ".join(map(percent, quarters)) + " |",
    ]
    return "\n".join(lines)


def filled(card: str, scores: dict[str, Any]) -> str:
    """The card with its figures replaced. Raises ValueError without the marks around them."""
    before, _, rest = card.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the card lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables(scores)}\n\n{END}{after}"


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--scores", type=Path, required=True)
    parse.add_argument("--card", type=Path, required=True)
    args = parse.parse_args()
    scores = json.loads(args.scores.read_text(encoding="utf-8"))
    args.card.write_text(filled(args.card.read_text(encoding="utf-8"), scores), encoding="utf-8")


if __name__ == "__main__":
    main()
