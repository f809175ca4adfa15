"""`python -m realtide.gpu`: the check on the command line, with the standard library's parser (ours)."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "golden"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check.

    Returns:
        The exit status: 0; 1 if something failed; 2 if nothing could be checked.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"gpu-check needs PyTorch: {error}\n")
        return 2
    from realtide.bench import report
    from realtide.gpu.check import CheckError, Options, check

    def tell(line: str) -> None:
        (sys.stderr if options.as_json else sys.stdout).write(f"{line}\n")

    try:
        found = check(
            Options(
                device=options.device,
                small=options.small,
                compiled=options.compiled,
                budget=options.budget,
                goldens=(*options.goldens, GOLDENS) if GOLDENS.is_dir() else tuple(options.goldens),
                case=options.case,
            ),
            tell,
        )
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    result = report.envelope("gpu", found)
    result["command"] = shlex.join(["python", "-m", "realtide.gpu", *given])
    if options.out is not None:
        report.write(options.out, result)
    if options.as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    for failure in found["failed"]:
        sys.stderr.write(f"failed: {failure}\n")
    return 1 if found["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m realtide.gpu",
        description="Replay golden cases on a GPU, then time the models beside what it can do at best.",
    )
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu")
    parser.add_argument(
        "--small", action="store_true", help="tiny models: tries the program, measures nothing"
    )
    parser.add_argument("--compiled", action="store_true", help="compile the modules first (torch.compile)")
    parser.add_argument(
        "--budget", type=_seconds, default=480.0, metavar="SECONDS", help="for everything (480)"
    )
    parser.add_argument(
        "--goldens",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="more golden cases; repeatable",
    )
    parser.add_argument("--case", default="*", metavar="PATTERN", help="replay only cases of this name")
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="one JSON object on standard output"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON too")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}") from None
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
