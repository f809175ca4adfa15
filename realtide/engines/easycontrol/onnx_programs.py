"""EasyControl's programs over their ONNX graphs (ours). What serves on a CPU; imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from realtide.engines.easycontrol.programs import Programs
from realtide.engines.runtime.ort import OrtOptions, OrtProgram
from realtide.engines.runtime.program import Array


def image_programs(
    graphs: Programs[Path], weights: Mapping[str, Array], options: OrtOptions | None = None
) -> Programs[OrtProgram]:
    """All programs. Raises ProgramError: a graph cannot be loaded, or lacks a weight."""
    return graphs.map(lambda graph: OrtProgram(graph, weights, {}, options))
