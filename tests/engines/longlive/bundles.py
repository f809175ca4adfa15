"""A small video bundle with random weights, written as a real one is."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.numpy import save_file

from realtide.bundle import write_manifest
from realtide.engines.longlive.config import TextConfig
from realtide.engines.longlive.export import export_decoder, export_text, export_video
from realtide.engines.longlive.layout import TEXT, TRANSFORMER, VAE
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.program import Array
from tests.engines.longlive import small
from tests.engines.longlive.conftest import Player, video_config

LINES = [
    "a cat walks over a red roof",
    "the sun sets behind the sea and the sky",
    "a dog runs",
    "one two three",
]


def write_bundle(directory: Path) -> Path:
    """Write the bundle into a new directory."""
    (directory / "onnx").mkdir(parents=True)
    config = video_config(rotary="relative")
    player = Player(replace(config, transformer=replace(config.transformer, text_tokens=16)))
    torch.manual_seed(3)
    vae = WanVae(small.VAE).eval().requires_grad_(False)
    text = TextConfig(vocab=60, dim=10, attention_dim=8, ff_dim=20, heads=2, layers=1)
    encoder = TextEncoder(text).eval().requires_grad_(False)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    weights: dict[str, Array] = {}
    for prefix, module in ((TRANSFORMER, player.model), (VAE, vae), (TEXT, encoder)):
        weights |= {prefix + name: value.numpy() for name, value in module.state_dict().items()}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        directory / "weights.safetensors",
    )
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 5), model_writer=pieces, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(pieces.getvalue())
    config, graphs = player.config, directory / "onnx"
    export_video(player.model, config, graphs, prefix=TRANSFORMER)
    export_decoder(vae, config.stream.height, config.stream.width, graphs, prefix=VAE)
    export_text(encoder, graphs / "text.onnx", prefix=TEXT)
    programs = ("prompt", "denoise", "clean", "recache", "decode_first", "decode_next", "text")
    write_manifest(
        directory,
        {
            "engine": "longlive",
            "name": directory.name,
            "version": "1.0.0",
            "description": "Random weights.",
            "licence": "Apache-2.0",
            "architecture": {
                "transformer": config.transformer.to_dict(),
                "stream": config.stream.to_dict(),
                "vae": small.VAE.to_dict(),
                "text": text.to_dict(),
                "video": {"frames_per_second": 16.0},
            },
            "limits": {"frames_per_second": [1, 60]},
            "precisions": ["float32"],
            "weights": "weights.safetensors",
            "programs": {name: {"float32": f"onnx/{name}.onnx"} for name in programs},
            "assets": {"tokenizer": "tokenizer.model"},
            "provenance": {"recipe": "random", "created": "2026-11-25"},
        },
    )
    return directory
