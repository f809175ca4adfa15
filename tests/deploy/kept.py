"""Whether what went through somebody's models came out as it was."""

from __future__ import annotations

from typing import Any


def assert_kept(before: Any, after: Any, where: str) -> None:
    """Every field and item of `before` is in `after`, which may have more; `where` names it in the error."""
    if isinstance(before, dict):
        for key, value in before.items():
            assert key in after, f"{where}.{key}"
            assert_kept(value, after[key], f"{where}.{key}")
    elif isinstance(before, list):
        assert len(before) == len(after), where
        for index, (left, right) in enumerate(zip(before, after, strict=True)):
            assert_kept(left, right, f"{where}[{index}]")
    else:
        assert before == after, where
