"""Graphs: what they hold, and that streams over them are streams over the modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from realtide.engines.longlive import onnx_programs
from realtide.engines.longlive.config import (
    TextConfig,
    cache_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.export import export_decoder, export_encoder, export_text, export_video
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.int8 import quantize_passes
from realtide.engines.longlive.programs import FrameDecoder, FrameEncoder, Passes
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.torch_programs import decoder_programs, encoder_programs
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.program import Array
from tests.engines.longlive.conftest import Player, video_config


def arrays(module: torch.nn.Module, prefix: str = "") -> dict[str, Array]:
    return {prefix + name: value.numpy() for name, value in module.state_dict().items()}


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_a_stream_over_graphs_is_a_stream_over_modules(mode: str, tmp_path: Path) -> None:
    player = Player(video_config(rotary=mode))
    graphs = export_video(player.model, player.config, tmp_path, prefix="transformer.")
    check_that_graphs_hold_no_weights(graphs)
    cache = zeros({name: (rows, *shape) for name, (rows, shape) in cache_shapes(player.config).items()})
    programs = onnx_programs.video_programs(graphs, arrays(player.model, "transformer."), cache)
    served = VideoStream(player.config, programs, cache, seed=3)
    eager, held = player.stream(seed=3)
    for block in range(6):
        if block in (0, 2, 5):
            assert served.set_prompt(player.text(block)) == eager.set_prompt(player.text(block))
        np.testing.assert_allclose(served.block(), eager.block(), atol=1e-4)
    for name, array in held.items():
        np.testing.assert_allclose(cache[name], array, atol=1e-4)
    # A checkpoint made by one backend goes on in the other.
    resumed = VideoStream.resume(player.config, *player.bound(), served.export())
    np.testing.assert_allclose(resumed.block(), served.block(), atol=1e-4)


def check_that_graphs_hold_no_weights(graphs: Passes[Path]) -> None:
    for path in (graphs.prompt, graphs.denoise, graphs.clean, graphs.recache):
        graph = onnx.load(path, load_external_data=False).graph
        external = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert external
        assert all(name.startswith("transformer.") for name in external)
        assert all(np.prod(t.dims) < 1000 for t in graph.initializer if t.name not in external)
    # A pass that only remembers needs neither the head nor the last layer beyond its keys and values.
    assert not {name for name in external if ".head." in name or name.startswith("transformer.blocks.1.ffn")}


def test_a_stream_over_int8_graphs_stays_near(tmp_path: Path) -> None:
    config = video_config()
    # Wide enough for its products to be quantized.
    player = Player(replace(config, transformer=replace(config.transformer, layers=1, dim=96, ff_dim=192)))
    floats = export_video(player.model, player.config, tmp_path)
    eights = quantize_passes(floats)
    assert [path.name for path in (eights.prompt, eights.denoise, eights.clean, eights.recache)] == [
        "prompt.onnx", "denoise.int8.onnx", "clean.int8.onnx", "recache.int8.onnx",
    ]  # fmt: skip
    shapes = {name: (rows, *shape) for name, (rows, shape) in cache_shapes(player.config).items()}
    latents = []
    for graphs in (floats, eights):
        cache = zeros(shapes)
        programs = onnx_programs.video_programs(graphs, arrays(player.model), cache)
        stream = VideoStream(player.config, programs, cache, seed=3)
        stream.set_prompt(player.text(0))
        blocks = [stream.block() for _ in range(3)]
        stream.set_prompt(player.text(1))
        latents.append(np.concatenate([*blocks, stream.block()]))
    difference = np.linalg.norm(latents[0] - latents[1]) / np.linalg.norm(latents[0])
    assert 1e-5 < difference < 0.05


def test_a_decoder_and_an_encoder_over_graphs(vae: WanVae, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 3, 4, 5)).astype(np.float32)
    graphs = export_decoder(vae, 4, 5, tmp_path, prefix="vae.")
    caches, held = (zeros(dict(decoder_shapes(vae.config, 4, 5))) for _ in range(2))
    served = FrameDecoder(onnx_programs.half_programs(graphs, arrays(vae, "vae."), caches))
    eager = FrameDecoder(decoder_programs(vae, held, 4, 5))
    for latent in latents:
        np.testing.assert_allclose(served.decode(latent), eager.decode(latent), atol=1e-4)
    for name, array in held.items():
        np.testing.assert_allclose(caches[name], array, atol=1e-4)

    video = rng.standard_normal((5, 3, 16, 20)).astype(np.float32)
    graphs = export_encoder(vae, 16, 20, tmp_path)
    caches, held = (zeros(dict(encoder_shapes(vae.config, 16, 20))) for _ in range(2))
    there = FrameEncoder(onnx_programs.half_programs(graphs, arrays(vae), caches))
    here = FrameEncoder(encoder_programs(vae, held, 16, 20))
    for chunk in np.split(video, [1, 3]):
        np.testing.assert_allclose(there.encode(chunk), here.encode(chunk), atol=1e-4)


def test_a_text_encoder_takes_prompts_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(vocab=40, dim=12, attention_dim=8, ff_dim=20, heads=2, layers=2)).eval()
    path = export_text(encoder, tmp_path / "text.onnx", prefix="text.")
    program = onnx_programs.text_program(path, arrays(encoder, "text."))
    for length in (1, 5, 300):
        ids = np.arange(length) % 40
        with torch.inference_mode():
            want = EncodeText(encoder)(torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(program.run({"ids": ids})["embeds"], want, atol=1e-4)
