"""What runs a video bundle: its programs and caches on each backend (ours).

ONNX Runtime keeps caches in host memory; PyTorch keeps them on its device, where sessions use them.
Frameworks are imported only by whoever asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from realtide.bundle import Bundle, Precision
from realtide.engines.longlive.caches import Cache
from realtide.engines.longlive.config import (
    TextConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    decoder_shapes,
)
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.layout import DECODE, PASSES, TEXT, TEXT_GRAPH, TRANSFORMER, VAE
from realtide.engines.longlive.programs import FrameDecoder
from realtide.engines.runtime.memory import HOST, Memory
from realtide.engines.runtime.program import Array, ProgramError, Runs

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf


@dataclass(frozen=True, slots=True)
class Model:
    """What is loaded.

    Attributes:
        bundle: where graphs are.
        precision: of the programs.
        config: transformer and stream.
        vae: the VAE.
        text: the text encoder.
        weights: all of the bundle's.
    """

    bundle: Bundle
    precision: Precision
    config: VideoConfig
    vae: VaeConfig
    text: TextConfig
    weights: Mapping[str, Array] = field(repr=False)

    def part(self, prefix: str) -> dict[str, Array]:
        """The weights of a part, by its own names."""
        weights = self.weights
        return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}

    def keys(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a session's key/value cache."""
        return {name: (rows, *shape) for name, (rows, shape) in cache_shapes(self.config).items()}

    def features(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a session's feature caches."""
        stream = self.config.stream
        return dict(decoder_shapes(self.vae, stream.height, stream.width))


@dataclass(frozen=True, slots=True)
class Loaded:
    """Ready to serve.

    Attributes:
        text: ids [tokens] of a prompt to embeddings [tokens, dim].
        caches: with the programs that are bound to each.
        memory: where the caches are.
    """

    text: Runs
    caches: list[Cache]
    memory: Memory


def onnx(model: Model, count: int, threads: int) -> Loaded:
    """`count` caches over the bundle's graphs, which are in memory once.

    Raises:
        BundleError, ProgramError: a graph is missing or cannot be loaded.
    """
    from realtide.engines.longlive import onnx_programs
    from realtide.engines.runtime.ort import OrtOptions

    options = OrtOptions(intra_op_num_threads=threads)

    def graph(name: str) -> Path:
        return model.bundle.graph(name, model.precision)

    def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        # Zeros commit no memory until they are written.
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    keys, features = zeros(model.keys()), zeros(model.features())
    passes = onnx_programs.video_programs(PASSES.map(graph), model.weights, keys, options)
    halves = onnx_programs.half_programs(DECODE.map(graph), model.weights, features, options)
    caches = [Cache(passes, keys, halves, features)]
    for _ in range(count - 1):
        keys, features = zeros(model.keys()), zeros(model.features())
        over = onnx_programs.video_over(passes, keys), onnx_programs.half_over(halves, features)
        caches.append(Cache(over[0], keys, over[1], features))
    return Loaded(onnx_programs.text_program(graph(TEXT_GRAPH), model.weights, options), caches, HOST)


def torch(model: Model, count: int, threads: int, device: str, compiled: bool = False) -> Loaded:
    """`count` caches over the PyTorch modules, on a device.

    On a GPU the passes over a block and decoding are recorded as CUDA graphs before anybody watches;
    compiled before that, on the processor too, if it is wanted. float8: the products of the transformer's
    blocks; all else is then in bfloat16.

    Raises:
        ProgramError: the device has too little memory or no float8, or a graph cannot be recorded.
    """
    import torch

    from realtide.engines.longlive import torch_programs
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    torch.set_num_threads(threads)
    memory, gpu = TorchMemory(device), device != "cpu"
    dtype = torch.float32 if model.precision == "float32" else torch.bfloat16
    # One for the thread that denoises, one for the thread that decodes.
    pools = [torch.cuda.graph_pool_handle() for _ in range(2)] if gpu else [None, None]
    stream = model.config.stream
    with out_of_memory(f"{model.bundle.manifest.name} in {model.precision} with {count} caches"):
        network = torch_programs.transformer(model.config.transformer, model.part(TRANSFORMER))
        network.fuse()
        network.to(device, dtype)
        if model.precision == "float8":
            # As in the graphs: what timesteps go through and the last layer are not in the blocks.
            from realtide.engines.runtime import fp8

            if not fp8.convert(network.blocks):
                raise ProgramError(f"{model.bundle.manifest.name}: no layer of a block can be in float8")
        decoder = torch_programs.vae(model.vae, model.part(VAE)).to(device, dtype)
        encoder = torch_programs.text_encoder(model.text, model.part(TEXT)).to(device, dtype)
        caches = []
        for _ in range(count):
            keys, features = (
                {name: memory.zeros(shape, dtype) for name, shape in shapes.items()}
                for shapes in (model.keys(), model.features())
            )
            passes = torch_programs.video_programs(
                network, model.config, keys, record=gpu, compiled=compiled, pool=pools[0]
            )
            halves = torch_programs.decoder_programs(
                decoder,
                features,
                stream.height,
                stream.width,
                record=gpu,
                compiled=compiled,
                pool=pools[1],
            )
            caches.append(Cache(passes, keys, halves, features))
        if gpu or compiled:
            for cache in caches:
                warm_up(model, cache, memory)
    return Loaded(torch_programs.text_program(encoder), caches, memory)


def tensorrt(model: Model, count: int, device: str, plan_of: PlanOf) -> Loaded:
    """`count` caches over TensorRT plans, which are on the device once.

    Raises:
        ProgramError: a plan is missing or cannot be loaded, or the device has too little memory.
    """
    from realtide.engines.longlive import plan_programs
    from realtide.engines.runtime import cuda_memory
    from realtide.engines.runtime.tensorrt_program import Scratch
    from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

    memory = TorchMemory(device)
    with out_of_memory(f"{model.bundle.manifest.name} in {model.precision} with {count} caches"):
        # One for the thread that denoises, one for the thread that decodes: each has a stream of its own.
        denoising, decoding = (Scratch(cuda_memory.CudaDevice(memory.index)) for _ in range(2))
        passes = plan_programs.PassPlans(plan_of, model.config, denoising, device)
        halves = plan_programs.HalfPlans(plan_of, decoding, device)
        text = plan_programs.text_program(plan_of, TEXT_GRAPH, denoising, device)
        caches = plan_programs.caches(passes, halves, count)
        for cache in caches:
            warm_up(model, cache, memory)
    return Loaded(text, caches, memory)


def warm_up(model: Model, cache: Cache, memory: Memory) -> None:
    """Run all of a cache's programs at every size that a video brings, but for recaches.

    What a backend does once for a size, such as to record a graph or to choose kernels, is done then, and
    what it cannot do is found out before a session needs it.
    """
    stream = VideoStream(model.config, cache.programs, cache.keys, memory=memory)
    text = np.zeros((1, model.config.transformer.text_dim), np.float32)
    stream.set_prompt(text)
    for _ in range(math.ceil(model.config.stream.window / model.config.stream.block) + 1):
        latents = stream.block()
    stream.set_prompt(text)
    decoder = FrameDecoder(cache.decoder)
    for latent in [latents[0]] * 4:
        memory.pixels(decoder.decode(latent))
    memory.wait()
