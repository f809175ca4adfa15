"""Put measured scores into the model card (ours).

card.py --scores benchmarks/results/easycontrol_emoji_scores.json --card models/easycontrol-emoji/README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"


def tables(scores: dict[str, Any]) -> str:
    """What stands between the marks."""
    edges = [
        ("these edges as condition", "edges"),
        ("these edges and a subject, which training never had together", "edges_two_conditions"),
        ("no condition, same prompt and seed", "edges_without_condition"),
        ("another name's edges as condition (shuffled)", "edges_shuffled"),
        ("96x64 or 64x96 pixels, which training never had: these edges", "edges_untrained_size"),
        ("the same sizes, no condition", "edges_untrained_size_without_condition"),
    ]
    colours = [
        ("this subject as condition", "colour_subject"),
        ("this subject and edges", "colour_two_conditions"),
        ("edges only", "colour_edges_only"),
        ("no condition, same prompt and seed", "colour_free"),
    ]
    rows = ["| Drawn with | edges that agree (IoU) |", "|---|---|"]
    rows += [f"| {told} | {scores[name]:.3f} |" for told, name in edges]
    rows += ["", "| Drawn with | mean colour's distance from the subject's |", "|---|---|"]
    rows += [f"| {told} | {scores[name]:.3f} |" for told, name in colours]
    rows += [
        "",
        f"{scores['names']} held-out names; {scores['seconds_an_image']:.2f} s an image of {scores['steps']} "
        "steps, median over all of these, condition and decoding included, one thread.",
    ]
    return "\n".join(rows)


def filled(card: str, scores: dict[str, Any]) -> str:
    """The card with these scores between the marks. Raises ValueError without marks."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the card must have {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables(scores)}\n\n{END}{after}"


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--scores", type=Path, required=True)
    parse.add_argument("--card", type=Path, required=True)
    args = parse.parse_args()
    text = filled(args.card.read_text(encoding="utf-8"), json.loads(args.scores.read_text(encoding="utf-8")))
    args.card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
