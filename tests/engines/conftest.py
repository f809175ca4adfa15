"""What tests of several engines use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`torch.compile` captures graphs and runs them as they are; gives the names of what was captured.

    What a compiler makes of them afterwards is its own affair, takes minutes, and needs C++.
    """
    names: list[str] = []
    whole = torch.compile

    def capture(model: Any, **options: Any) -> Any:
        assert options["fullgraph"]
        names.append(type(model).__name__)
        return whole(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", capture)
    yield names
    torch._dynamo.reset()
