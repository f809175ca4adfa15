"""Times LongLive: single passes, decoding, and blocks with the window full (ours).

Weights are random: times do not depend on them. Latents, cache and frames stay on the device but for the
frames that are *delivered*, which end in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realtide.engines.longlive import rotary, schedule, window
from realtide.engines.longlive.config import (
    StreamConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
)
from realtide.engines.longlive.steps import Denoise, Remember
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, WanVae
from realtide.engines.runtime import fp8
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.gpu.bench import Bench
from realtide.gpu.counts import Work, decoded_frame, video_pass

_NEEDED = 20 << 30  # 1.3B in bfloat16, the cache of one session and what recording a graph puts aside


def config(small: bool) -> tuple[VideoConfig, VaeConfig]:
    """Wan2.1-1.3B at 832x480 and its VAE, or a tiny model."""
    if small:
        model = TransformerConfig(
            layers=2, dim=48, heads=4, ff_dim=96, freq_dim=16, channels=4, text_dim=16, text_tokens=8
        )
        stream = StreamConfig(height=4, width=4, window=9)
        vae = VaeConfig(dim=4, latent=4, residual_blocks=1, mean=(0.0,) * 4, std=(1.0,) * 4)
        return VideoConfig(model, stream), vae
    return VideoConfig(TransformerConfig(), StreamConfig()), VaeConfig(mean=(0.0,) * 16, std=(1.0,) * 16)


def run(bench: Bench, compiled: bool) -> dict[str, Any]:
    """All times.

    Args:
        bench: the machine.
        compiled: compile the modules first.

    Raises:
        Skipped: the device has too little memory.
    """
    if not bench.small:
        bench.room(_NEEDED, "LongLive with 1.3B parameters at 832x480")
    shapes, vae_shapes = config(bench.small)
    stream = _Stream(bench, shapes, vae_shapes, compiled)
    found: dict[str, Any] = {
        "model": {
            "parameters": sum(p.numel() for p in stream.model.parameters()),
            "width": shapes.stream.width * vae_shapes.spatial_scale,
            "height": shapes.stream.height * vae_shapes.spatial_scale,
            "window": shapes.stream.window,
            "steps": len(shapes.stream.steps),
            "compiled": compiled,
        }
    }
    found["passes"] = stream.passes()
    found["blocks"] = stream.blocks()
    found["fp8"] = stream.narrow(compiled)
    return found


class _Stream:
    """One session whose window is full."""

    def __init__(self, bench: Bench, config: VideoConfig, vae: VaeConfig, compiled: bool) -> None:
        self.bench, self.config, self.vae = bench, config, vae
        self.model = bench.model(lambda: WanTransformer(config.transformer))
        self.model.fuse()
        decoder = bench.model(lambda: WanVae(vae))
        stream = config.stream
        self.state = [bench.random(rows, *shape) for rows, shape in cache_shapes(config).values()]
        self.cross = [bench.random(*shape) for shape in cross_shapes(config).values()]
        features = [
            bench.random(*shape) for shape in decoder_shapes(vae, stream.height, stream.width).values()
        ]
        full, ring = stream.window, stream.window - stream.sink
        end = 2 * stream.window + stream.block
        self.block = self._inputs(end, stream.block)
        self.replay = self._inputs(end, ring)
        modules = {
            "denoise": Denoise(self.model, config, full),
            "clean": Remember(self.model, config, full),
        }
        self.programs: dict[str, dict[str, Callable[[], Any]]] = {}
        kinds = {"eager": False, "graph": True} if bench.cuda else {"eager": False}
        self.decode: dict[str, Callable[[], Any]] = {}
        row = torch.ones(1, dtype=torch.int64, device=bench.device)
        self.frame = bench.random(1, *config.latent_shape)
        with torch.inference_mode():
            DecodeFirst(decoder)(self.frame, row, *features)
        for kind, record in kinds.items():
            made = {
                name: DeviceProgram(module, self.state, self.cross, record=record, compiled=compiled)
                for name, module in modules.items()
            }
            self.programs[kind] = {
                "denoise": lambda program=made["denoise"]: program.run(*self.block),  # type: ignore[misc]
                "clean": lambda program=made["clean"]: program.run(*self.block),  # type: ignore[misc]
                "recache": lambda program=made["clean"]: program.run(*self.replay),  # type: ignore[misc]
            }
            next_frames = DeviceProgram(DecodeNext(decoder), features, record=record, compiled=compiled)
            self.programs[kind]["decode"] = lambda program=next_frames: program.run(  # type: ignore[misc]
                self.frame, row
            )

    def _inputs(self, end: int, frames: int) -> list[Tensor]:
        """Inputs of a pass over the newest `frames` frames of `end`."""
        bench, config = self.bench, self.config
        first = end - frames
        tables = [
            rotary.time_table(config, np.arange(first, end)),
            rotary.space_table(config),
        ]
        sinusoids = schedule.sinusoid(np.full(frames, 500.0), config.transformer.freq_dim)
        return [
            bench.random(frames, *config.latent_shape),
            torch.from_numpy(sinusoids).to(bench.device, bench.dtype),
            *(torch.from_numpy(table).to(bench.device) for table in tables),
            torch.from_numpy(window.places(config.stream, first, frames)).to(bench.device),
            torch.from_numpy(window.seen(config.stream, end)).to(bench.device),
        ]

    def passes(self) -> dict[str, Any]:
        """Each program alone, as queued kernel by kernel and as a replayed graph, in turn."""
        stream, item = self.config.stream, self.bench.itemsize
        ring = stream.window - stream.sink
        work = {
            "denoise": video_pass(self.config, stream.block, stream.window, item),
            "clean": video_pass(self.config, stream.block, stream.window, item, predict=False),
            "recache": video_pass(self.config, ring, stream.window, item, predict=False),
            "decode": decoded_frame(self.vae, stream.height, stream.width, item),
        }
        found: dict[str, Any] = {}
        for name, each in work.items():
            runs = {kind: programs[name] for kind, programs in self.programs.items()}
            timed = self.bench.clock.paired(runs, self.bench.seconds)
            found[name] = {kind: self.bench.entry(timing, each) for kind, timing in timed.items()}
        if "graph" in self.programs:
            made = [programs["denoise"]()[0].float() for programs in self.programs.values()]
            found["denoise"]["graph_differs"] = float((made[0] - made[1]).abs().max())
        return found

    def narrow(self, compiled: bool) -> dict[str, Any]:
        """A denoising pass with the blocks' linear layers in float8; they stay so."""
        if (reason := fp8.refusal(self.bench.device)) is not None:
            return {"skipped": reason}
        layers = fp8.convert(self.model.blocks)
        runs: dict[str, Callable[[], Any]] = {}
        for kind in self.programs:
            module = Denoise(self.model, self.config, self.config.stream.window)
            program = DeviceProgram(module, self.state, self.cross, record=kind == "graph", compiled=compiled)
            runs[kind] = lambda program=program: program.run(*self.block)  # type: ignore[misc]
        timed = self.bench.clock.paired(runs, self.bench.seconds)
        denoise = {kind: self.bench.entry(timing) for kind, timing in timed.items()}
        return {"layers": layers, "denoise": denoise}

    def blocks(self) -> dict[str, Any]:
        """Whole blocks: their rate, and frames of video a second denoised, decoded, and in host memory."""
        best = self.programs["graph" if self.bench.cuda else "eager"]
        stream, item = self.config.stream, self.bench.itemsize
        frames = stream.block * self.vae.temporal_scale

        def denoised() -> None:
            for _ in stream.steps:
                best["denoise"]()
            best["clean"]()

        def decoded() -> Tensor:
            denoised()
            for _ in range(stream.block):
                made: Tensor = best["decode"]()[0]
            return made

        def delivered() -> None:
            denoised()
            for _ in range(stream.block):
                made: Tensor = best["decode"]()[0]
                pixels = (made.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
                pixels.permute(0, 2, 3, 1).contiguous().cpu()

        with torch.inference_mode():
            timed = self.bench.clock.paired(
                {"denoised": denoised, "decoded": decoded, "delivered": delivered}, 2 * self.bench.seconds
            )
        passes = video_pass(self.config, stream.block, stream.window, item).times(len(stream.steps))
        passes += video_pass(self.config, stream.block, stream.window, item, predict=False)
        whole = passes + decoded_frame(self.vae, stream.height, stream.width, item).times(stream.block)
        works: dict[str, Work] = {"denoised": passes, "decoded": whole, "delivered": whole}
        found: dict[str, Any] = {}
        for name, timing in timed.items():
            rate = 1e3 / timing.median
            found[name] = self.bench.entry(timing, works[name])
            found[name] |= {"blocks_per_second": round(rate, 3), "fps": round(rate * frames, 2)}
        return found
