"""Writes a speech bundle: weights, ONNX graphs, tokenizer and manifest (ours; extra ``export``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from realtide.bundle import Manifest, write_manifest
from realtide.engines.ancat.config import (
    NO_CAP,
    EncoderConfig,
    state_shapes,
    static_lanes,
    static_shapes,
    threshold,
)
from realtide.engines.ancat.frontend import Float32, FrontendConfig
from realtide.engines.ancat.model import JoinerProgram, Transducer
from realtide.engines.ancat.stream import StreamStep
from realtide.engines.ancat.stream_static import STATIC_OUTPUTS, StaticStep, WithoutDial
from realtide.engines.ancat.torch_programs import OUTPUTS, build
from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.int8 import quantize_graph
from realtide.engines.runtime.products import calibrate
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.weights import WeightFile

WEIGHTS = "weights.safetensors"
STATIC_GRAPH = "onnx/encoder_static.onnx"
OPSET = 20


def example(
    config: EncoderConfig, frames: list[int], done: list[int], *, final: bool, seed: int
) -> dict[str, torch.Tensor]:
    """One call's inputs: `frames[b]` new frames for stream b after `done[b]` earlier ones, in slot b + 1."""
    generator = torch.Generator().manual_seed(seed)
    streams = len(frames)
    stream = torch.repeat_interleave(torch.arange(streams), torch.tensor(frames))
    position = torch.cat([torch.arange(d, d + n) for d, n in zip(done, frames, strict=True)])
    biases = [-2.0, 0.0, 3.0, 6.0]
    return {
        "windows": torch.randn(sum(frames), config.window, config.mel_bins, generator=generator),
        "stream": stream,
        "position": position,
        "slots": torch.arange(1, streams + 1),
        "arrived": torch.tensor(done) + torch.tensor(frames),
        "least": torch.tensor([threshold(biases[b % 4]) for b in range(streams)]),
        "cap": torch.tensor([NO_CAP if b % 2 else 6 for b in range(streams)]),
        "final": torch.full((streams,), int(final)),
    }


def export_encoder(model: Transducer, step_frames: int, path: Path) -> None:
    """Export the streaming step.

    Before it is written the graph is compared with the module over a short conversation of calls.
    """
    config = model.config
    slots = 4
    state = {
        name: torch.zeros(slots * rows, *shape, dtype=getattr(torch, dtype))
        for name, (rows, shape, dtype) in state_shapes(config, step_frames).items()
    }
    calls = [
        example(config, [3, 2, step_frames], [0, 0, 0], final=False, seed=1),
        example(config, [1, step_frames], [3, 2], final=False, seed=2),
        example(config, [0, 0, 0], [4, 2 + step_frames, step_frames], final=False, seed=3),
        example(config, [5], [4], final=False, seed=4),
        example(config, [2, 1, 4], [9, 2 + step_frames, step_frames], final=True, seed=5),
    ]
    inputs = list(calls[0])
    if config.rule == "causal":
        inputs = [name for name in inputs if name not in ("least", "cap", "final")]
    dynamic = {name: {0: "frames"} for name in ("windows", "stream", "position")}
    dynamic |= {
        name: {0: "streams"} for name in ("slots", "arrived", "least", "cap", "final") if name in inputs
    }
    dynamic |= {name: {0: "counted" if name in ("counts", "newest") else "rows"} for name in state}
    module: Any = StreamStep(model.encoder, step_frames)
    if config.rule == "causal":
        module = WithoutDial(module, len(inputs))
    outputs = OUTPUTS
    examples = [{name: call[name] for name in inputs} for call in calls]
    # The examples are noise, on which rows reach far beyond those of speech; so does what rounding moves.
    export_program(
        module,
        examples,
        state,
        outputs,
        path,
        dynamic=dynamic,
        opset=OPSET,
        tolerance=5e-4,
    )


def export_static(model: Transducer, step_frames: int, path: Path) -> None:
    """Export the step whose shapes depend on no value, compared with the module as `export_encoder` does."""
    config, lanes, slots = model.config, static_lanes(step_frames), 4
    shapes = static_shapes(config, step_frames)
    state = {
        name: torch.zeros(slots * rows, *shape, dtype=getattr(torch, dtype))
        for name, (rows, shape, dtype) in shapes.items()
    }
    calls = []
    done = [0, 0, 0]
    some = (lanes + 1) // 2
    for seed, frames in enumerate(([lanes, some, 1], [some, lanes], [0, 0, lanes], [lanes] * 3, [1, 0, 0])):
        calls.append(static_example(config, frames, done, lanes, final=seed == 4, seed=seed))
        done = [d + n for d, n in zip(done, [*frames, 0], strict=False)]
    module: Any = StaticStep(model.encoder, step_frames, lanes)
    if config.rule == "causal":
        calls = [{k: v for k, v in call.items() if k not in ("least", "cap", "final")} for call in calls]
        module = WithoutDial(module, len(calls[0]))
    # Rings of one size have one name: TensorRT holds dimensions of one name to be equal.
    long, short = config.long_ring(step_frames) * config.heads, config.short_ring(step_frames)
    names = {long: "long", short: "short", 1: "slots"}
    dynamic = {name: {0: "streams"} for name in calls[0]}
    dynamic |= {name: {0: names[rows]} for name, (rows, _, _) in shapes.items()}
    export_program(module, calls, state, STATIC_OUTPUTS, path, dynamic=dynamic, opset=OPSET, tolerance=5e-4)


def static_example(
    config: EncoderConfig, frames: list[int], done: list[int], lanes: int, *, final: bool, seed: int
) -> dict[str, torch.Tensor]:
    """`example`, with the frames in lanes."""
    call = example(config, frames, done[: len(frames)], final=final, seed=seed)
    windows = torch.zeros(len(frames), lanes, config.window, config.mel_bins)
    for lane, part in zip(windows, torch.split(call["windows"], frames), strict=True):
        lane[: len(part)] = part
    rest = {name: call[name] for name in ("slots", "arrived", "least", "cap", "final")}
    return {"windows": windows, "fresh": torch.tensor(frames), **rest}


def export_joiner(model: Transducer, path: Path) -> None:
    """Export predictor and joiner."""
    config = model.config
    examples = [
        {"encoded": torch.randn(n, config.joiner_dim), "contexts": torch.randint(0, config.vocab, (n, 2))}
        for n in (3, 1, 7, 0)
    ]
    dynamic = {"encoded": {0: "rows"}, "contexts": {0: "rows"}}
    export_program(JoinerProgram(model), examples, {}, ["log_probs"], path, dynamic=dynamic, opset=OPSET)


def export_int8(
    config: EncoderConfig, step_frames: int, directory: Path, calibration: Sequence[Float32]
) -> None:
    """Write the encoder's int8 graph; activation ranges come from `calibration`."""
    source = directory / "onnx" / "encoder.onnx"
    weights = WeightFile(directory / WEIGHTS)
    state: dict[str, Array] = {
        name: np.zeros((len(calibration) * rows, *shape), dtype)
        for name, (rows, shape, dtype) in state_shapes(config, step_frames).items()
    }
    ranges = calibrate(source, weights, state, _calls(config, calibration))
    # Static ranges: fast at any batch, and a stream's words do not depend on who shares its step. The first
    # products stay float: log-mel reaches far beyond what the layers above see.
    quantize_graph(
        source,
        directory / "onnx" / "encoder.int8.onnx",
        activations="static",
        ranges=ranges,
        select=lambda name: "subsample" not in name and "scheduler" not in name,
    )


def _calls(config: EncoderConfig, calibration: Sequence[Float32]) -> Iterator[dict[str, Array]]:
    """Play each recording on a slot of its own, 4 frames a call, at the middle of the dial."""
    for slot, windows in enumerate(calibration):
        for first in range(0, len(windows), 4):
            frames = windows[first : first + 4]
            arrived = first + len(frames)
            call: dict[str, Array] = {
                "windows": np.ascontiguousarray(frames, np.float32),
                "stream": np.zeros(len(frames), np.int64),
                "position": np.arange(first, arrived),
                "slots": np.array([slot]),
                "arrived": np.array([arrived]),
            }
            if config.rule != "causal":
                call |= {
                    "least": np.full(1, threshold(0.0), np.float32),
                    "cap": np.array([NO_CAP]),
                    "final": np.array([int(arrived == len(windows))]),
                }
            yield call


def write_bundle(
    directory: Path,
    config: EncoderConfig,
    weights: Mapping[str, Array],
    mean: Float32,
    std: Float32,
    tokenizer: Path,
    manifest: Mapping[str, Any],
    *,
    step_frames: int = 12,
    frontend: FrontendConfig | None = None,
    word_times: Mapping[str, float] | None = None,
    search: Mapping[str, float] | None = None,
    calibration: Sequence[Float32] = (),
) -> Manifest:
    """Write everything a server needs into `directory`.

    Args:
        directory: the bundle; created. Other files in it stay.
        config: the architecture.
        weights: a `Transducer`'s state_dict as arrays; stored in half precision, without the auxiliary CTC
            head.
        mean: of the log-mel features [mel_bins].
        std: their standard deviation [mel_bins].
        tokenizer: SentencePiece model.
        manifest: name, version, description, licence, limits, scores, provenance.
        step_frames: most new frames of one stream in one call.
        frontend: features; None: the defaults.
        word_times: calibrated offsets of word starts and ends, milliseconds.
        search: fields of `utterance.DecoderConfig` that the weights need: repeat_gain and repeat_frames.
        calibration: normalised windows [n, window, mel_bins] of representative recordings; with some, the
            bundle also has an int8 encoder.

    Raises:
        ProgramError, BundleError: a graph does not agree with its module, or the manifest is incomplete.
    """
    front = frontend or FrontendConfig()
    (directory / "onnx").mkdir(parents=True, exist_ok=True)
    stored: dict[str, Array] = {
        name: np.asarray(value, np.float16) for name, value in weights.items() if not name.startswith("ctc.")
    }
    stored |= {"features.mean": np.asarray(mean, np.float32), "features.std": np.asarray(std, np.float32)}
    save_file(stored, directory / WEIGHTS)
    model = build(config, WeightFile(directory / WEIGHTS))
    export_encoder(model, step_frames, directory / "onnx" / "encoder.onnx")
    export_static(model, step_frames, directory / STATIC_GRAPH)
    export_joiner(model, directory / "onnx" / "joiner.onnx")
    precisions, encoders = ["float32"], {"float32": "onnx/encoder.onnx"}
    joiners, static = {"float32": "onnx/joiner.onnx"}, {"float32": STATIC_GRAPH}
    if calibration:
        export_int8(config, step_frames, directory, calibration)
        precisions.append("int8")
        encoders["int8"] = "onnx/encoder.int8.onnx"
        joiners["int8"] = "onnx/joiner.onnx"  # small, and its input is every score's: it stays float
        static["int8"] = STATIC_GRAPH  # int8 is for the CPU, which has no use for it
    shutil.copyfile(tokenizer, directory / "tokenizer.model")
    architecture = {
        "encoder": config.to_dict(),
        "step_frames": step_frames,
        "frontend": {name: getattr(front, name) for name in front.__dataclass_fields__},
        "word_times": dict(word_times or {}),
        "search": dict(search or {}),
    }
    return write_manifest(
        directory,
        {
            "engine": "ancat",
            "architecture": architecture,
            "precisions": precisions,
            "weights": WEIGHTS,
            "programs": {"encoder": encoders, "encoder_static": static, "joiner": joiners},
            "assets": {"tokenizer": "tokenizer.model"},
            **manifest,
        },
    )
