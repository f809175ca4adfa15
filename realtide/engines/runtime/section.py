"""A section of a manifest's `architecture` as a frozen dataclass that checks itself (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Self


class Section:
    """A section of the manifest's `architecture`: plain values that are checked when they are read."""

    __slots__ = ()
    section = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a manifest's mapping; raises ValueError naming an unknown or wrong field."""
        unknown = set(values) - {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{cls.section} has no field {sorted(unknown)[0]!r}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def at_least_one(self, *names: str) -> None:
        """Raise ValueError unless these fields are whole numbers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.section}.{name} must be a whole number of at least 1, got {value!r}")
