"""What runs an image bundle: its programs on each backend, and where conditions' caches lie (ours).

Frameworks are imported only by whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from realtide.bundle import Bundle, Precision
from realtide.engines.easycontrol.config import ImageConfig, PooledConfig, TextConfig
from realtide.engines.easycontrol.layout import PROGRAMS
from realtide.engines.easycontrol.programs import FLOAT, ImagePrograms
from realtide.engines.runtime.memory import HOST, Memory
from realtide.engines.runtime.program import Array, Runs

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf


@dataclass(frozen=True, slots=True)
class Model:
    """What is loaded.

    Attributes:
        bundle: where graphs are.
        precision: of the programs.
        config: shapes.
        text: the text encoder.
        pooled: the pooled encoder.
        weights: all of the bundle's.
    """

    bundle: Bundle
    precision: Precision
    config: ImageConfig
    text: TextConfig
    pooled: PooledConfig
    weights: Mapping[str, Array] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Ready to serve.

    Attributes:
        programs: all of them.
        memory: where prompts and the caches of conditions are.
        dtype: of what programs are fed from the host.
    """

    programs: ImagePrograms
    memory: Memory = HOST
    dtype: np.dtype[Any] = FLOAT


def onnx(model: Model, threads: int) -> Loaded:
    """The bundle's graphs. Raises BundleError, ProgramError."""
    from realtide.engines.easycontrol import onnx_programs
    from realtide.engines.runtime.ort import OrtOptions

    graphs = PROGRAMS.map(lambda name: model.bundle.graph(name, model.precision))
    options = OrtOptions(intra_op_num_threads=threads)
    programs = onnx_programs.image_programs(graphs, model.weights, options)
    # The graphs say in which precision they are fed.
    return Loaded(programs, HOST, programs.denoise.inputs[0].dtype)


def torch(model: Model, threads: int, device: str, compiled: bool = False) -> Loaded:
    """The PyTorch modules, on a device. Raises ProgramError: it has too little memory."""
    import torch

    from realtide.engines.easycontrol import torch_programs
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if model.precision == "bfloat16" else torch.float32
    with out_of_memory(f"{model.bundle.manifest.name} in {model.precision}"):
        made = torch_programs.loaded(model.config, model.text, model.pooled, model.weights)
        made.transformer.fuse()
        for module in made.parts().values():
            module.to(device, dtype)
        programs = torch_programs.image_programs(made, model.config, compiled)
    return Loaded(programs, TorchMemory(device))


def tensorrt(model: Model, device: str, plan_of: PlanOf) -> Loaded:
    """TensorRT plans. Steps of an image have its size, so nothing is replayed as a CUDA graph.

    Raises:
        ProgramError: a plan is missing or cannot be loaded, or the device has too little memory.
    """
    from realtide.engines.runtime import cuda_memory
    from realtide.engines.runtime.plan_program import PlanPrograms
    from realtide.engines.runtime.tensorrt_program import Scratch
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    memory = TorchMemory(device)
    with out_of_memory(f"{model.bundle.manifest.name} in {model.precision}"):
        # One for the thread that denoises, one for the thread that decodes: each has a stream of its own.
        denoising, decoding = (Scratch(cuda_memory.CudaDevice(memory.index)) for _ in range(2))

        def program(name: str) -> Runs:
            scratch = decoding if name in (PROGRAMS.decode, PROGRAMS.preview) else denoising
            return PlanPrograms(plan_of(name), scratch, device, graphs=False, kept=True).over({})

        return Loaded(PROGRAMS.map(program), memory)
