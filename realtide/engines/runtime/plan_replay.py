"""Plans made on the spot for golden cases, which need no bundle and no cache (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from realtide.engines.runtime import cuda_memory
from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.tensorrt import Plan, PlanOf, Sizes, build_engine
from realtide.engines.runtime.tensorrt_program import Scratch


def plans_of(
    graphs: Mapping[str, Path], weights: Mapping[str, Array], sizes: Mapping[str, Mapping[str, Sizes]]
) -> PlanOf:
    """Plans of exported graphs.

    Args:
        graphs: by program.
        weights: by their names in the graphs.
        sizes: of the dynamic dimensions, by program.
    """

    def plan_of(program: str) -> Plan:
        data = graphs[program].read_bytes()
        built = build_engine(data, weights, sizes.get(program, {}), label=program)
        return Plan(program, built, read_graph(data))

    return plan_of


def scratch_on(device: str) -> Scratch:
    """Activation memory on a device, as PyTorch names it. Raises ProgramError: there is none."""
    return Scratch(cuda_memory.CudaDevice(torch.device(device).index or 0))
