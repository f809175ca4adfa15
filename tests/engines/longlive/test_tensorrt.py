"""Graphs in half precision: they compute nearly what float32 does, and TensorRT compiles them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from realtide.engines.longlive import layout
from realtide.engines.longlive.config import (
    TextConfig,
    VaeConfig,
    cache_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.export import (
    export_decoder,
    export_encoder,
    export_text,
    export_video,
    pass_example,
)
from realtide.engines.longlive.steps import Denoise, Prompt, Remember
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, EncodeFirst, EncodeNext, WanVae
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.tensorrt import Sizes, build_engine
from tests.engines.longlive.conftest import transformer, video_config

CONFIG = video_config(rotary="relative")
VAE = VaeConfig(
    dim=4, latent=3, multipliers=(1, 2), residual_blocks=1, temporal=(True,),
    mean=(0.1, -0.2, 0.3), std=(1.5, 0.5, 1.0),
)  # fmt: skip
HEIGHT, WIDTH = 4, 6
SIZES = {"frames": Sizes(1, 4, 6), "tokens": Sizes(1, 12, 64)}


@dataclass
class Case:
    """A program in float32, and what to feed it."""

    module: nn.Module
    inputs: dict[str, Tensor]
    state: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]


@dataclass
class Half:
    """All nine graphs in half precision, their weights, and the modules in float32."""

    directory: Path
    weights: dict[str, Array]
    cases: dict[str, Case]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    directory = tmp_path_factory.mktemp("half")
    model = transformer(CONFIG)
    torch.manual_seed(4)
    vae = WanVae(VAE).eval().requires_grad_(False)
    text = TextEncoder(TextConfig(vocab=40, dim=10, attention_dim=8, ff_dim=20, heads=2, layers=2))
    text.eval().requires_grad_(False)
    weights: dict[str, Array] = {}
    parts: tuple[tuple[str, nn.Module], ...] = (
        (layout.TRANSFORMER, model), (layout.VAE, vae), (layout.TEXT, text)
    )  # fmt: skip
    for prefix, part in parts:
        weights |= {prefix + name: value.numpy() for name, value in part.state_dict().items()}
    export_video(copy.deepcopy(model).half(), CONFIG, directory, prefix=layout.TRANSFORMER)
    narrow_vae = copy.deepcopy(vae).half()
    export_decoder(narrow_vae, HEIGHT, WIDTH, directory, prefix=layout.VAE)
    export_encoder(narrow_vae, 2 * HEIGHT, 2 * WIDTH, directory, prefix=layout.VAE)
    graph = directory / f"{layout.TEXT_GRAPH}.onnx"
    export_text(copy.deepcopy(text).half(), graph, prefix=layout.TEXT)
    return Half(directory, weights, cases(model, vae, text))


def cases(model: WanTransformer, vae: WanVae, text: TextEncoder) -> dict[str, Case]:
    stream = CONFIG.stream
    cache = {name: (rows, *shape) for name, (rows, shape) in cache_shapes(CONFIG).items()}
    decoder, encoder = decoder_shapes(VAE, HEIGHT, WIDTH), encoder_shapes(VAE, 2 * HEIGHT, 2 * WIDTH)
    later = 3 * stream.window
    block = pass_example(CONFIG, later, stream.block, 500.0)
    window = pass_example(CONFIG, later, stream.window - stream.sink, 0.0)
    row = {"row": torch.tensor([1])}
    latents = {"latents": torch.randn(1, VAE.latent, HEIGHT, WIDTH)} | row
    frames = torch.rand(2, 3, 2 * HEIGHT, 2 * WIDTH) * 2 - 1
    remember = Remember(model, CONFIG)
    embeds = {"text": torch.randn(CONFIG.transformer.text_tokens, CONFIG.transformer.text_dim)}
    return {
        "prompt": Case(Prompt(model), embeds, {}, ("cross_key_0", "cross_value_1")),
        "denoise": Case(Denoise(model, CONFIG), block, cache, ("flow",)),
        "clean": Case(remember, block, cache, ()),
        "recache": Case(remember, window, cache, ()),
        "decode_first": Case(DecodeFirst(vae), latents, dict(decoder), ("frames",)),
        "decode_next": Case(DecodeNext(vae), latents, dict(decoder), ("frames",)),
        "encode_first": Case(EncodeFirst(vae), {"frames": frames[:1]} | row, dict(encoder), ("latents",)),
        "encode_next": Case(EncodeNext(vae), {"frames": frames} | row, dict(encoder), ("latents",)),
        "text": Case(EncodeText(text), {"ids": torch.arange(9)}, {}, ("embeds",)),
    }


@pytest.mark.parametrize("program", layout.PROGRAMS)
def test_half_precision_computes_nearly_the_same(program: str, half: Half) -> None:
    case = half.cases[program]
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.5 * torch.randn(*shape, generator=generator) for name, shape in case.state.items()}
    feeds = {name: narrow(value) for name, value in case.inputs.items()}
    held = {name: narrow(value) for name, value in state.items()}
    got = dict(OrtProgram(half.directory / f"{program}.onnx", half.weights, held).run(feeds)) | held
    with torch.inference_mode():
        results = case.module(*case.inputs.values(), *state.values())
    results = results if isinstance(results, tuple) else (results,)
    names = [*got][: len(results) - len(state)] + list(state)
    assert set(case.outputs) <= set(names)
    for name, want in zip(names, results, strict=True):
        exact = want.double().numpy()
        assert got[name].dtype == np.float16
        assert np.linalg.norm(got[name] - exact) <= 0.01 * np.linalg.norm(exact), name


@pytest.mark.parametrize("program", layout.PROGRAMS)
def test_tensorrt_compiles_every_graph(program: str, half: Half) -> None:
    graph = half.directory / f"{program}.onnx"
    outputs = onnx.load(graph, load_external_data=False).graph.output
    types = {value.type.tensor_type.elem_type for value in outputs}
    assert types == {onnx.TensorProto.FLOAT16}
    assert len(build_engine(graph, half.weights, SIZES)) > 10_000


def narrow(value: Tensor) -> Array:
    array: Array = (value.half() if value.is_floating_point() else value).numpy().copy()
    return array
