"""The speech engine's programs over the PyTorch modules themselves, instead of their ONNX graphs (ours).

For golden comparisons and for machines where PyTorch is what runs fast. Serving on a CPU never imports
this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realtide.engines.ancat.config import EncoderConfig, state_shapes, static_lanes
from realtide.engines.ancat.model import JoinerProgram, Transducer
from realtide.engines.ancat.stream import StreamStep
from realtide.engines.ancat.stream_static import STATIC_OUTPUTS, StaticStep, WithoutDial
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import Array, Program, TensorSpec
from realtide.engines.runtime.resident_program import ResidentProgram, named
from realtide.engines.runtime.torch_program import State, TorchProgram

INT, FLOAT = np.dtype(np.int64), np.dtype(np.float32)


def input_specs(config: EncoderConfig) -> tuple[TensorSpec, ...]:
    """Inputs of the encoder's step, in order."""
    return (
        TensorSpec("windows", FLOAT, ("frames", config.window, config.mel_bins)),
        TensorSpec("stream", INT, ("frames",)),
        TensorSpec("position", INT, ("frames",)),
        TensorSpec("slots", INT, ("streams",)),
        TensorSpec("arrived", INT, ("streams",)),
        TensorSpec("least", FLOAT, ("streams",)),
        TensorSpec("cap", INT, ("streams",)),
        TensorSpec("final", INT, ("streams",)),
    )


OUTPUTS = ("encoded", "stream_out", "position_out", "available", "more")


def output_specs(config: EncoderConfig) -> tuple[TensorSpec, ...]:
    """Outputs of the encoder's step, in order."""
    return (
        TensorSpec("encoded", FLOAT, ("nodes", config.joiner_dim)),
        *(TensorSpec(name, INT, ("nodes",)) for name in OUTPUTS[1:4]),
        TensorSpec("more", INT, ("streams",)),
    )


def build(config: EncoderConfig, weights: Mapping[str, Array]) -> Transducer:
    """A model with the bundle's weights, in evaluation mode; KeyError or RuntimeError if they do not fit."""
    model = Transducer(config)
    wanted = {name for name in model.state_dict() if not name.startswith("ctc.")}
    values = {name: torch.from_numpy(np.asarray(weights[name], np.float32).copy()) for name in wanted}
    model.load_state_dict({**model.state_dict(), **values})
    return model.eval()


def programs(
    config: EncoderConfig,
    step_frames: int,
    weights: Mapping[str, Array],
    state: State,
    threads: int,
) -> tuple[Program, Program]:
    """Encoder and joiner on the processor, in the form that computes no more than it must.

    `state` as in `config.state_shapes`, updated in place; `threads` is PyTorch's own, process-wide.
    """
    torch.set_num_threads(threads)
    model = build(config, weights)
    rings = tuple(
        TensorSpec(name, np.dtype(dtype), ("rows", *shape))
        for name, (_, shape, dtype) in state_shapes(config, step_frames).items()
    )
    step = StreamStep(model.encoder, step_frames).eval()
    encoder = TorchProgram(step, input_specs(config), output_specs(config), rings, state)
    joiner = TorchProgram(
        JoinerProgram(model),
        (TensorSpec("encoded", FLOAT, ("rows", config.joiner_dim)), TensorSpec("contexts", INT, ("rows", 2))),
        (TensorSpec("log_probs", FLOAT, ("rows", config.vocab)),),
        (),
        {},
    )
    return encoder, joiner


def device_programs(
    model: Transducer,
    step_frames: int,
    state: Mapping[str, Tensor],
    *,
    record: bool,
    compiled: bool = False,
) -> tuple[ResidentProgram, ResidentProgram]:
    """The static encoder step and the joiner on the model's device.

    `state` as in `config.static_shapes`, in that order and on the device, with the encoder's own type instead
    of float32; updated in place. `record`: replay CUDA graphs, one for each size of calls;
    `compiled`: compile first.
    """
    config, device, dtype = model.config, model.joiner.out.weight.device, model.encoder.project.weight.dtype
    step: Any = StaticStep(model.encoder, step_frames, static_lanes(step_frames))
    inputs = {"windows": dtype, "fresh": torch.int64, "slots": torch.int64, "arrived": torch.int64}
    if config.rule == "causal":
        step = WithoutDial(step, len(inputs))
    else:
        inputs |= {"least": torch.float32, "cap": torch.int64, "final": torch.int64}
    call = named(DeviceProgram(step, tuple(state.values()), record=record, compiled=compiled), STATIC_OUTPUTS)
    encoder = ResidentProgram("encoder", call, inputs, device)
    score = named(DeviceProgram(JoinerProgram(model), (), record=record, compiled=compiled), ("log_probs",))
    types = {"encoded": torch.float32, "contexts": torch.int64}
    return encoder, ResidentProgram("joiner", score, types, device)
