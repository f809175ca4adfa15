"""The cell, exported once a session."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from realtide.engines.runtime.export import export_program
from tests.engines.runtime.cell import DYNAMIC, Cell, Exported, feeds, state, tensors


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export the cell and save its weights."""
    torch.manual_seed(0)
    module = Cell().eval()
    folder = tmp_path_factory.mktemp("cell")
    program = export_program(
        module,
        [tensors(feeds(count, seed)) for seed, count in enumerate((3, 0, 1, 9))],
        tensors(state()),
        ["y", "picked"],
        folder / "cell.onnx",
        dynamic=DYNAMIC,
    )
    save_file(dict(module.state_dict()), folder / "weights.safetensors")
    return Exported(module, folder / "cell.onnx", folder / "weights.safetensors", program)
