"""Write evaluate.py's figures into the model card's tables, so that nobody copies them by hand (ours).

card.py --scores scores.json --card models/ancat-commands-en/README.md
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def percent(value: float | None, unit: str = " %") -> str:
    """A share as percent with one decimal; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}{unit}"


def clean(values: dict[str, Any]) -> list[str]:
    """Cells of a set in the main table, behind its name and pool."""
    low, high = (percent(edge, "") for edge in values["interval"])
    return [
        str(values["utterances"]),
        f"{percent(values['rate'])}, {low}-{high}",
        percent(values["exact"]),
        percent(values["slots"]),
        f"{values['lookahead_mean_ms']:.0f}",
    ]


def filled(card: str, scores: dict[str, Any]) -> str:
    """The card with its figures replaced. Raises KeyError for a table row whose pool was not scored."""
    lines = []
    for line in card.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        pool = re.fullmatch(r"`(\w+_test)`", cells[1]) if line.startswith("|") and len(cells) > 2 else None
        if pool and len(cells) == 7:
            cells[2:] = clean(scores[pool[1]])
        elif pool and len(cells) == 4:
            cells[2:] = [percent(scores[f"{pool[1]}_{change}"]["rate"]) for change in ("noise10", "phone")]
        elif cells[0] in ("word starts", "word ends"):
            times, edge = scores["strings_test"]["word_times"], cells[0].removeprefix("word ")[:-1]
            cells[1:] = [
                f"{times[f'{edge}_{name}_ms']:.0f}" for name in ("median", "median_absolute", "p90_absolute")
            ]
        else:
            lines.append(line)
            continue
        lines.append("| " + " | ".join(cells) + " |")
    return re.sub(r"\|  \|", "|  |", "\n".join(lines))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    args = parser.parse_args()
    scores = json.loads(args.scores.read_text(encoding="utf-8"))
    args.card.write_text(filled(args.card.read_text(encoding="utf-8"), scores), encoding="utf-8")


if __name__ == "__main__":
    main()
