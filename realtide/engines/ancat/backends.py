"""What runs a speech bundle: its programs and the state of its slots on each backend (ours).

Frameworks are imported only by whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from realtide.bundle import Bundle, Precision
from realtide.engines.ancat.config import EncoderConfig, state_shapes, static_shapes
from realtide.engines.ancat.device_rows import DeviceRows
from realtide.engines.ancat.search import Joiner
from realtide.engines.ancat.static_encoder import PaddedJoiner, StaticEncoder
from realtide.engines.runtime.memory import Memory
from realtide.engines.runtime.program import Array, ProgramError, Runs
from realtide.engines.runtime.slots import SlotState

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf


class Rows(Protocol):
    """State of slots; see `slots.SlotState`."""

    @property
    def nbytes(self) -> int: ...  # noqa: D102
    def zero(self, slot: int) -> None: ...  # noqa: D102
    def export(self, slot: int) -> bytes: ...  # noqa: D102
    def load(self, slot: int, data: bytes) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Source:
    """What is loaded.

    Attributes:
        bundle: where graphs are.
        precision: of the programs.
        config: the architecture.
        step_frames: most new frames of a stream in a step.
        slots: of sessions.
        max_batch: most streams of a step.
        weights: all of the bundle's.
    """

    bundle: Bundle
    precision: Precision
    config: EncoderConfig
    step_frames: int
    slots: int
    max_batch: int
    weights: Mapping[str, Array] = field(repr=False)

    def arrays(self) -> dict[str, Array]:
        """State in host memory; pages that are never written are never committed."""
        shapes = state_shapes(self.config, self.step_frames).items()
        return {name: np.zeros((self.slots * rows, *shape), dtype) for name, (rows, shape, dtype) in shapes}

    def rows(self, state: Mapping[str, Array]) -> SlotState:
        """Slots of these arrays."""
        shapes = state_shapes(self.config, self.step_frames)
        return SlotState(state, {name: rows for name, (rows, _, _) in shapes.items()}, self.slots)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Ready to serve.

    Attributes:
        encoder: packed frames to packed rows.
        joiner: for the search.
        rows: the encoder's state.
    """

    encoder: Runs
    joiner: Joiner
    rows: Rows


def onnxruntime(source: Source, threads: int) -> Loaded:
    """The bundle's graphs on a processor."""
    from realtide.engines.runtime.ort import OrtOptions, OrtProgram

    options, state = OrtOptions(intra_op_num_threads=threads), source.arrays()
    graph = source.bundle.graph
    encoder = OrtProgram(graph("encoder", source.precision), source.weights, state, options)
    joiner = OrtProgram(graph("joiner", source.precision), source.weights, {}, options)
    return Loaded(encoder, host_joiner(joiner), source.rows(state))


def torch(source: Source, threads: int, device: str | None, compiled: bool = False) -> Loaded:
    """The PyTorch modules on a device; None: on the processor, in the form that suits it if that is float32.

    What is compiled is the form of fixed sizes, for the processor too.

    In bfloat16 the joiner stays in float32: it is small, and every score of the search is its own.

    Raises:
        ProgramError: the device has too little memory, or a graph cannot be recorded.
    """
    from realtide.engines.ancat.torch_programs import programs

    if device is not None or source.precision != "float32" or compiled:
        return _torch_device(source, threads, device or "cpu", compiled)
    state = source.arrays()
    encoder, joiner = programs(source.config, source.step_frames, source.weights, state, threads)
    return Loaded(encoder, host_joiner(joiner), source.rows(state))


def _torch_device(source: Source, threads: int, device: str, compiled: bool) -> Loaded:
    """The static step with all state on a device; on a GPU it is recorded as CUDA graphs."""
    import torch

    from realtide.engines.ancat import torch_programs
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    torch.set_num_threads(threads)
    memory = TorchMemory(device)
    with out_of_memory(f"{source.bundle.manifest.name} with {source.slots} slots"):
        shapes = static_shapes(source.config, source.step_frames)
        kinds = {"float32": getattr(torch, source.precision), "int64": torch.int64}
        state = {
            name: memory.zeros(((source.slots + 1) * rows, *shape), kinds[dtype])
            for name, (rows, shape, dtype) in shapes.items()
        }
        model = torch_programs.build(source.config, source.weights).to(device)
        model.encoder.to(kinds["float32"])
        encoder, joiner = torch_programs.device_programs(
            model, source.step_frames, state, record=device != "cpu", compiled=compiled
        )
        return _on_device(source, memory, encoder, joiner, state)


def tensorrt(source: Source, device: str, plan_of: PlanOf) -> Loaded:
    """TensorRT plans of the static encoder and of the joiner.

    Raises:
        ProgramError: a plan is missing or cannot be loaded, there are more slots than plans have room for, or
            the device has too little memory.
    """
    from realtide.engines.ancat.graphs import PLAN_SLOTS
    from realtide.engines.runtime import cuda_memory
    from realtide.engines.runtime.plan_program import PlanPrograms, torch_type
    from realtide.engines.runtime.tensorrt_program import Scratch
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    if source.slots > PLAN_SLOTS * source.max_batch:
        raise ProgramError(
            f"slots must be at most {PLAN_SLOTS} for each of max_batch with the backend tensorrt, "
            f"{PLAN_SLOTS * source.max_batch}, not {source.slots}"
        )
    memory = TorchMemory(device)
    with out_of_memory(f"{source.bundle.manifest.name} with {source.slots} slots"):
        scratch = Scratch(cuda_memory.CudaDevice(memory.index))
        plan, shapes = plan_of("encoder_static"), static_shapes(source.config, source.step_frames)
        sizes = {name: ((source.slots + 1) * rows, *shape) for name, (rows, shape, _) in shapes.items()}
        state = {spec.name: memory.zeros(sizes[spec.name], torch_type(spec)) for spec in plan.graph.state}
        encoder = PlanPrograms(plan, scratch, device).over(state)
        joiner = PlanPrograms(plan_of("joiner"), scratch, device).over({})
        return _on_device(source, memory, encoder, joiner, state)


def _on_device(
    source: Source, memory: Memory, encoder: Runs, joiner: Runs, state: Mapping[str, object]
) -> Loaded:
    """Programs of the static step, run at every size once."""
    config, frames, slots = source.config, source.step_frames, source.slots
    static = StaticEncoder(encoder, memory, config, frames, source.max_batch, spare=slots)
    padded = PaddedJoiner(joiner, memory, source.max_batch * frames)
    static.warm_up()
    padded.warm_up(config.joiner_dim)
    return Loaded(static, padded, DeviceRows(memory, state, config, frames, slots))


def host_joiner(program: Runs) -> Joiner:
    """The joiner as the search calls it, of a program in host memory."""
    return lambda encoded, contexts: program.run({"encoded": encoded, "contexts": contexts})["log_probs"]
