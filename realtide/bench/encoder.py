"""The streaming encoder's graph by itself: fed with many streams' windows in steps, timed (ours)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from realtide.bundle import load_bundle
from realtide.engines.ancat.config import NO_CAP, EncoderConfig, state_shapes, threshold
from realtide.engines.ancat.frontend import Float32, Frontend, FrontendConfig
from realtide.engines.runtime.ort import OrtOptions, OrtProgram
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.weights import WeightFile


@dataclass(frozen=True, slots=True)
class Times:
    """What playing some streams took.

    `steps` [n] are seconds of each step; `frames` are encoder frames of all streams together; `latency` is
    the mean number of frames that outputs waited for; `rows` [frames, J] are the first stream's outputs.
    """

    steps: npt.NDArray[np.float64]
    frames: int
    latency: float
    rows: Float32

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return float(self.steps.sum())


class EncoderBench:
    """A graph with state for `slots` streams, one thread.

    Args:
        graph: of the encoder's step.
        weights: for its external initializers.
        config: the architecture.
        step_frames: most new frames of a stream in a call.
        slots: most streams.
    """

    def __init__(
        self, graph: Path, weights: Mapping[str, Array], config: EncoderConfig, step_frames: int, slots: int
    ) -> None:
        self.config = config
        self.step_frames = step_frames
        self._state: dict[str, Array] = {
            name: np.zeros((slots * rows, *shape), dtype)
            for name, (rows, shape, dtype) in state_shapes(config, step_frames).items()
        }
        self._program = OrtProgram(graph, weights, self._state, OrtOptions(intra_op_num_threads=1))
        self._inputs = {spec.name for spec in self._program.inputs}

    @classmethod
    def of_bundle(cls, directory: Path | str, slots: int, precision: str | None = None) -> EncoderBench:
        """The encoder of a bundle. Raises BundleError, ProgramError."""
        bundle = load_bundle(directory)
        architecture = bundle.manifest.architecture
        return cls(
            bundle.graph("encoder", bundle.precision(precision)),
            WeightFile(bundle.weights),
            EncoderConfig.from_dict(architecture["encoder"]),
            int(architecture["step_frames"]),
            slots,
        )

    def play(self, windows: Float32, frames: int, *, bias: float = 0.0, cap: int | None = None) -> Times:
        """Advance all streams together, `frames` new frames of each in a step, from fresh state to the end.

        Args:
            windows: [S, T, 7, mel], as `windows_of` gives them.
            frames: new frames of a stream in a step, at most `step_frames`.
            bias: on the schedulers' logits.
            cap: most frames of lookahead; None: no cap.
        """
        streams, length = windows.shape[:2]
        for array in self._state.values():
            array[...] = 0
        slots = np.arange(streams, dtype=np.int64)
        least = np.full(streams, threshold(bias), np.float32)
        caps = np.full(streams, NO_CAP if cap is None else cap, np.int64)
        seconds, rows, waited, count = [], [], 0, 0
        for first in range(0, length, frames):
            here = min(frames, length - first)
            feeds: dict[str, Array] = {
                "windows": windows[:, first : first + here].reshape(-1, *windows.shape[2:]),
                "stream": np.repeat(slots, here),
                "position": np.tile(np.arange(first, first + here), streams),
                "slots": slots,
                "arrived": np.full(streams, first + here, np.int64),
                "least": least,
                "cap": caps,
                "final": np.full(streams, int(first + here == length), np.int64),
            }
            feeds = {name: value for name, value in feeds.items() if name in self._inputs}
            begun = time.perf_counter()
            answers, owners = [self._program.run(feeds)], [slots]
            while bool(answers[-1]["more"].any()):
                # A burst that did not fit: its streams again, without new frames, as the engine does it.
                chosen = answers[-1]["more"] != 0
                owners.append(owners[-1][chosen])
                feeds = {
                    name: value[:0] if name in ("windows", "stream", "position") else value[chosen]
                    for name, value in feeds.items()
                }
                answers.append(self._program.run(feeds))
            seconds.append(time.perf_counter() - begun)
            for answer, owner in zip(answers, owners, strict=True):
                waited += int((answer["available"] - answer["position_out"]).sum())
                count += len(answer["position_out"])
                rows.append(answer["encoded"][owner[answer["stream_out"]] == 0])
        return Times(np.asarray(seconds), streams * length, waited / max(count, 1), np.concatenate(rows))


def windows_of(
    samples: Float32, rate: int, directory: Path | str, streams: int, frames: int | None = None
) -> Float32:
    """Encoder inputs [streams, frames, 7, mel] of a bundle's front end: evenly spread parts of a recording.

    Without `frames`, all of it.

    Raises ValueError if the recording has fewer than `frames` encoder frames, BundleError.
    """
    bundle = load_bundle(directory)
    weights = WeightFile(bundle.weights)
    mean, std = (np.asarray(weights[f"features.{name}"], np.float32) for name in ("mean", "std"))
    frontend = Frontend(rate, FrontendConfig(**bundle.manifest.architecture["frontend"]), mean=mean, std=std)
    frontend.push(samples)
    frontend.finish()
    windows = frontend.take()
    frames = len(windows) if frames is None else frames
    if len(windows) < frames:
        raise ValueError(f"the recordings have {len(windows)} frames, {frames} are needed")
    starts = np.linspace(0, len(windows) - frames, streams).astype(int)
    return np.stack([windows[start : start + frames] for start in starts])


def node_cost(directory: Path | str, samples: Float32, rate: int, rounds: int = 5) -> float:
    """Seconds of one (layer, frame) node of a bundle's graph: one stream, a frame a step, no lookahead.

    The median step by the number of layers, so the fixed part of a step is in it.

    Raises BundleError, ProgramError, and ValueError if the recording is shorter than two seconds.
    """
    bench = EncoderBench.of_bundle(directory, 1)
    windows = windows_of(samples, rate, directory, 1, 50)
    bench.play(windows, 1, cap=0)
    steps = np.concatenate([bench.play(windows, 1, cap=0).steps for _ in range(rounds)])
    return float(np.median(steps)) / bench.config.layers
