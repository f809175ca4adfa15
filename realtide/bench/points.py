"""What a sweep evaluates: models with the settings of their dial, as the command line names them (ours)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from realtide.cli.errors import UsageError

_FORM = "LABEL:PATH or LABEL:PATH:bias=B,B,..."


@dataclass(frozen=True, slots=True)
class Point:
    """A model and the biases at which it is evaluated. `path` is a checkpoint of the recipe or a bundle."""

    label: str
    path: Path
    biases: tuple[float, ...]

    @property
    def family(self) -> str:
        """What points of one curve have in common: the label without a number at its end."""
        return re.sub(r"[-_ ]?\d+$", "", self.label) or self.label

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read `LABEL:PATH[:bias=B,...]`; without biases, 0. Raises UsageError."""
        match = re.fullmatch(r"([^:]+):(.+?)(?::bias=([^:]*))?", text)
        if match is None:
            raise UsageError(f"--point {text!r} must be {_FORM}")
        label, path, listed = match.groups()
        try:
            biases = (0.0,) if listed is None else tuple(float(value) for value in listed.split(","))
        except ValueError:
            raise UsageError(f"--point {text!r} must be {_FORM}: biases are numbers") from None
        if len(set(biases)) < len(biases):
            raise UsageError(f"--point {text!r} names a bias twice")
        if not Path(path).exists():
            raise UsageError(f"--point {text!r}: there is no {path}")
        return cls(label, Path(path), biases)
