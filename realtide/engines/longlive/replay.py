"""Replays golden cases and compares every tensor with the reference's (ours).

A case is a safetensors file whose metadata describes it in JSON under ``case``; its weights lie beside it, in
a file with ``weights`` in its name and exactly the tensors of the case's model. Serving never imports this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from realtide.engines.longlive import window
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.layout import DECODE, ENCODE, TEXT_GRAPH, TRANSFORMER
from realtide.engines.longlive.programs import (
    FrameDecoder,
    FrameEncoder,
    HalfPrograms,
    Passes,
    Stages,
    VideoPrograms,
)
from realtide.engines.longlive.schedule import warped
from realtide.engines.runtime.golden import (
    Backend,
    CaseError,
    Report,
    check_precision,
    difference,
    read_case,
    weights_beside,
)
from realtide.engines.runtime.memory import HOST, Memory, Values
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.rewriting import rewrite
from realtide.engines.runtime.tensorrt import Sizes

if TYPE_CHECKING:
    from realtide.bundle import Precision


def replay(
    path: Path, backend: Backend = "torch", device: str = "cpu", precision: Precision = "float32"
) -> Report:
    """Replay one case.

    Args:
        path: the case.
        backend: *torch*: the modules, eager; *onnxruntime*: their exported graphs (needs the extra
            ``export``, and some 30 seconds to make them); *tensorrt*: plans of these graphs, built on the
            spot.
        device: of the backends *torch* and *tensorrt*.
        precision: of the graphs that *onnxruntime* runs, see `rewriting.rewrite`.

    Raises:
        CaseError: the file is no LongLive case, or its weights are not beside it.
        ProgramError: a graph could not be made or run.
        ValueError: the case's numbers make no model.
    """
    check_precision(backend, precision)
    case, tensors = read_case(path)
    plays: Iterable[tuple[str, _Play]] = (("rope", _video), ("z_dim", _vae), ("vocab", _text))
    for key, play in plays:
        if key in case:
            with tempfile.TemporaryDirectory(prefix="realtide-") as graphs:
                found = play(path, case, tensors, backend, Path(graphs), device, precision)
            compared = {n: difference(found[n], tensors[n]) for n in sorted(found) if n in tensors}
            if not compared:
                raise CaseError(f"{path}: the case has no result to compare with")
            return Report(path.name.removesuffix(".safetensors"), backend, compared, device, precision)
    raise CaseError(f"{path}: not a LongLive case: it has neither rope nor z_dim nor vocab")


_Play = Callable[[Path, dict[str, Any], dict[str, Array], Backend, Path, str, "Precision"], dict[str, Array]]


def _video(
    path: Path,
    case: dict[str, Any],
    tensors: dict[str, Array],
    backend: Backend,
    directory: Path,
    device: str,
    precision: Precision,
) -> dict[str, Array]:
    config = _video_config(case)
    from realtide.engines.longlive import torch_programs
    from realtide.engines.longlive.transformer import WanTransformer

    weights = weights_beside(path, WanTransformer(config.transformer).state_dict())
    model = torch_programs.transformer(config.transformer, weights)
    memory = _memory(backend, device)
    cache = _zeros({name: (rows, *shape) for name, (rows, shape) in cache_shapes(config).items()}, memory)
    if backend == "onnxruntime":
        from realtide.engines.longlive import export, onnx_programs
        from realtide.engines.longlive.graphs import FP8, FP8_KEPT, INT8
        from realtide.engines.runtime.products import Measured

        graphs = export.export_video(model, config, directory)
        paths = (graphs.prompt, graphs.denoise, graphs.clean, graphs.recache)
        if precision == "float8":
            # Scales need an example: the case itself, in float32.
            measured = [Measured(one, weights, {} if one is graphs.prompt else cache) for one in paths]
            _generated(case, tensors, config, Passes(*measured), cache, memory)
            ranges = {one.stem: found.ranges for one, found in zip(paths, measured, strict=True)}
            kept = [name.removeprefix(TRANSFORMER) for name in FP8_KEPT]
            rewrite(paths, precision, FP8, ranges, kept)
            for values in cache.values():
                values[...] = 0
        else:
            rewrite(paths, precision, INT8)
        programs: VideoPrograms = onnx_programs.video_programs(graphs, weights, cache)
    elif backend == "tensorrt":
        from realtide.engines.longlive import export
        from realtide.engines.longlive.graphs import pass_sizes
        from realtide.engines.longlive.plan_programs import PassPlans
        from realtide.engines.runtime.plan_replay import plans_of, scratch_on

        graphs = export.export_video(model, config, directory)
        named = {one.stem: one for one in (graphs.prompt, graphs.denoise, graphs.clean, graphs.recache)}
        plan_of = plans_of(named, weights, pass_sizes(config))
        programs = PassPlans(plan_of, config, scratch_on(device), device).over(cache)
    else:
        model.fuse()
        programs = torch_programs.video_programs(model.to(device), config, cache, record=device != "cpu")
    flows, latents = _generated(case, tensors, config, programs, cache, memory)
    ordered = window.order(config.stream, case["num_frames"])
    found: dict[str, Array] = {
        "denoising_timesteps": warped(config.stream.steps, config.stream.shift).astype(np.float32),
        "first_flow": flows[0][None],
        "latents": latents[None],
    }
    for layer in range(config.transformer.layers):
        for kind in ("key", "value"):
            name = f"{kind}_{layer}"
            found[f"kv.{layer}.{kind[0]}"] = _in_order(memory.get(cache[name]), config, ordered)
    return found


def _generated(
    case: dict[str, Any],
    tensors: dict[str, Array],
    config: VideoConfig,
    programs: VideoPrograms,
    cache: dict[str, Values],
    memory: Memory,
) -> tuple[list[Array], Array]:
    """Generate the case's video: the flow of every pass, and the latents [frames, C, height, width]."""
    block = config.stream.block

    def noise(first: int, count: int, step: int) -> NDArray[np.float32]:
        if not step:
            return tensors["noise"][0, first : first + count]
        fresh: NDArray[np.float32] = tensors["renoise"][first // block, step - 1, 0]
        return fresh

    stream = VideoStream(config, programs, cache, noise=noise, memory=memory)
    switches = [0, *case["switch_frames"]]
    flows: list[Array] = []
    blocks = []
    while stream.frames < case["num_frames"]:
        if stream.frames in switches:
            stream.set_prompt(tensors["prompt_embeds"][switches.index(stream.frames)])
        block_latents = stream.block(lambda flow: flows.append(memory.get(flow)))
        blocks.append(memory.get(block_latents))
    return flows, np.concatenate(blocks)


def _in_order(cache: Array, config: VideoConfig, ordered: window.Ints) -> Array:
    """A layer's keys or values as the reference keeps them: [1, tokens in the window's order, dim]."""
    model = config.transformer
    split = cache.reshape(model.heads, config.stream.window, config.frame_tokens, model.head_dim)
    return split[:, ordered].transpose(1, 2, 0, 3).reshape(1, -1, model.dim)


def _video_config(case: dict[str, Any]) -> VideoConfig:
    model = case["model"]
    height, width = case["latent_hw"]
    if model["patch_size"][0] != 1 or len({*model["patch_size"][1:]}) != 1:
        raise CaseError(f"patches of {model['patch_size']} are not supported")
    if model["in_dim"] != model["out_dim"]:
        raise CaseError("in_dim and out_dim must be equal")
    return VideoConfig(
        TransformerConfig(
            layers=model["num_layers"],
            dim=model["dim"],
            heads=model["num_heads"],
            ff_dim=model["ffn_dim"],
            freq_dim=model["freq_dim"],
            channels=model["in_dim"],
            patch=model["patch_size"][1],
            text_dim=model["text_dim"],
            text_tokens=model["text_len"],
            eps=model["eps"],
        ),
        StreamConfig(
            height=height,
            width=width,
            block=case["num_frame_per_block"],
            window=case["local_attn_size"],
            sink=case["sink_size"],
            rotary=case["rope"],
            global_sink=case["global_sink"],
            steps=tuple(case["denoising_step_list"]),
            shift=case["timestep_shift"],
            context_noise=case["context_noise"],
        ),
    )


def _vae(
    path: Path,
    case: dict[str, Any],
    tensors: dict[str, Array],
    backend: Backend,
    directory: Path,
    device: str,
    precision: Precision,
) -> dict[str, Array]:
    config = VaeConfig(
        dim=case["dim"],
        latent=case["z_dim"],
        multipliers=tuple(case["dim_mult"]),
        residual_blocks=case["num_res_blocks"],
        temporal=tuple(case["temporal_downsample"]),
        mean=tuple(map(float, tensors["latent_mean"])),
        std=tuple(map(float, tensors["latent_std"])),
    )
    from realtide.engines.longlive import torch_programs
    from realtide.engines.longlive.vae import WanVae

    shapes = WanVae(config).state_dict()
    half = ("decoder.", "conv2.") if "pixels" not in tensors else ""
    weights = weights_beside(path, {name: value for name, value in shapes.items() if name.startswith(half)})
    absent = _zeros({name: tuple(value.shape) for name, value in shapes.items() if name not in weights}, HOST)
    model = torch_programs.vae(config, weights | absent)
    memory = _memory(backend, device)
    if backend == "torch":
        model.to(device)

    def planned(graphs: Stages[Path], stages: Stages[str], caches: dict[str, Values]) -> HalfPrograms:
        from realtide.engines.longlive.plan_programs import HalfPlans
        from realtide.engines.runtime.plan_replay import plans_of, scratch_on

        plan_of = plans_of({stages.first: graphs.first, stages.later: graphs.later}, weights, {})
        return HalfPlans(plan_of, scratch_on(device), device, stages).over(caches)

    def decoder(height: int, width: int) -> HalfPrograms:
        caches = _zeros(decoder_shapes(config, height, width), memory)
        if backend == "onnxruntime":
            from realtide.engines.longlive import export, onnx_programs

            graphs = export.export_decoder(model, height, width, directory)
            rewrite((graphs.first, graphs.later), precision)
            return onnx_programs.half_programs(graphs, weights, caches)
        if backend == "tensorrt":
            from realtide.engines.longlive import export

            return planned(export.export_decoder(model, height, width, directory), DECODE, caches)
        return torch_programs.decoder_programs(model, caches, height, width, record=device != "cpu")

    def encoder(height: int, width: int) -> HalfPrograms:
        caches = _zeros(encoder_shapes(config, height, width), memory)
        if backend == "onnxruntime":
            from realtide.engines.longlive import export, onnx_programs

            graphs = export.export_encoder(model, height, width, directory)
            rewrite((graphs.first, graphs.later), precision)
            return onnx_programs.half_programs(graphs, weights, caches)
        if backend == "tensorrt":
            from realtide.engines.longlive import export

            return planned(export.export_encoder(model, height, width, directory), ENCODE, caches)
        return torch_programs.encoder_programs(model, caches, height, width)

    latents = np.ascontiguousarray(tensors["latents"][0].swapaxes(0, 1))  # B C T H W -> T C H W
    decoding = FrameDecoder(decoder(*latents.shape[2:]))
    frames = np.concatenate([memory.get(decoding.decode(memory.put(latent))) for latent in latents])
    found: dict[str, Array] = {"decoded_unclamped": frames.swapaxes(0, 1)[None]}
    if not half:
        pixels = np.ascontiguousarray(tensors["pixels"][0].swapaxes(0, 1))
        encoding = FrameEncoder(encoder(*pixels.shape[2:]))
        chunks = np.split(pixels, range(1, len(pixels), config.temporal_scale))
        encoded = np.stack([memory.get(encoding.encode(memory.put(chunk))) for chunk in chunks])
        found["encoded_mean"] = encoded.swapaxes(0, 1)[None]
    return found


def _text(
    path: Path,
    case: dict[str, Any],
    tensors: dict[str, Array],
    backend: Backend,
    directory: Path,
    device: str,
    precision: Precision,
) -> dict[str, Array]:
    if case["shared_pos"]:
        raise CaseError(f"{path}: one table of positions for all layers is not supported")
    config = TextConfig(
        vocab=case["vocab"],
        dim=case["dim"],
        attention_dim=case["dim_attn"],
        ff_dim=case["dim_ffn"],
        heads=case["num_heads"],
        layers=case["num_layers"],
        buckets=case["num_buckets"],
    )
    from realtide.engines.longlive import torch_programs
    from realtide.engines.longlive.text import TextEncoder

    weights = weights_beside(path, TextEncoder(config).state_dict())
    model = torch_programs.text_encoder(config, weights)
    memory = _memory(backend, device)
    program: Runs
    if backend == "onnxruntime":
        from realtide.engines.longlive import export, onnx_programs

        made = export.export_text(model, directory / "text.onnx")
        rewrite([made], precision)
        program = onnx_programs.text_program(made, weights)
    elif backend == "tensorrt":
        from realtide.engines.longlive import export
        from realtide.engines.longlive.plan_programs import text_program
        from realtide.engines.runtime.plan_replay import plans_of, scratch_on

        most = tensors["ids"].shape[1]
        sizes = {TEXT_GRAPH: {"tokens": Sizes(1, min(16, most), most)}}
        graph = export.export_text(model, directory / "text.onnx")
        plan_of = plans_of({TEXT_GRAPH: graph}, weights, sizes)
        program = text_program(plan_of, TEXT_GRAPH, scratch_on(device), device)
    else:
        program = torch_programs.text_program(model.to(device))
    embeds = np.zeros((*tensors["ids"].shape, config.dim), np.float32)
    for row, (ids, mask) in enumerate(zip(tensors["ids"], tensors["mask"], strict=True)):
        count = int(mask.sum())
        embeds[row, :count] = memory.get(program.run({"ids": ids[:count]})["embeds"])
    return {"embeds_padding_zeroed": embeds}


def _memory(backend: Backend, device: str) -> Memory:
    if backend == "onnxruntime":
        return HOST
    from realtide.engines.runtime.torch_memory import TorchMemory

    return TorchMemory(device)


def _zeros(shapes: Mapping[str, tuple[int, ...]], memory: Memory) -> dict[str, Values]:
    return {name: memory.put(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
