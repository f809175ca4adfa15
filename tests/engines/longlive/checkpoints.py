"""The golden cases' weights as the files that their models' owners publish."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from tests.engines.longlive.conftest import GOLDEN

Weights = dict[str, Tensor]
LINES = ["a cat walks over a red roof", "the sun sets behind the sea and the sky", "a dog runs"]


def golden(name: str) -> Weights:
    """Weights with the release's own names; the golden VAE is the whole one if it has an encoder."""
    return {key: torch.from_numpy(value) for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


def tokenizer(directory: Path) -> Path:
    """A directory with a SentencePiece model under UMT5's name."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES * 4), model_writer=model, vocab_size=45, hard_vocab_limit=False,
        minloglevel=3, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "spiece.model").write_bytes(model.getvalue())
    return directory


def lora(transformer: Mapping[str, Tensor], rank: int, seed: int = 0) -> Weights:
    """Random updates of every linear layer inside the blocks, with PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, value in transformer.items():
        if re.fullmatch(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.(q|k|v|o|0|2)\.weight", name):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            out, into = value.shape
            found[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(rank, into, generator=generator)
            found[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=generator)
    return found


def diffusers_transformer(weights: Mapping[str, Tensor]) -> Weights:
    """With the names of WanTransformer3DModel."""

    def renamed(name: str) -> str:
        if name.startswith("blocks."):
            name = name.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("norm3", "norm2")
            name = re.sub(r"(attn\d)\.([qkv])\.", r"\1.to_\2.", name).replace(".o.", ".to_out.0.")
            name = name.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
            return name.replace("modulation", "scale_shift_table")
        for part in ("time", "text"):
            for ours, theirs in (("0", "1"), ("2", "2")):
                name = name.replace(
                    f"{part}_embedding.{ours}", f"condition_embedder.{part}_embedder.linear_{theirs}"
                )
        name = name.replace("time_projection.1", "condition_embedder.time_proj")
        return name.replace("head.head", "proj_out").replace("head.modulation", "scale_shift_table")

    return {renamed(name): value for name, value in weights.items()}


def diffusers_vae(weights: Mapping[str, Tensor], residual_blocks: int) -> Weights:
    """With the names of AutoencoderKLWan."""

    def renamed(name: str) -> str:
        if name.startswith("conv"):
            return name.replace("conv1", "quant_conv").replace("conv2", "post_quant_conv")
        for ours, theirs in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
            name = name.replace(f"residual.{ours}.", f"{theirs}~.")
        name = name.replace("shortcut", "conv_shortcut").replace("downsamples", "down_blocks")
        name = re.sub(r"^(\w+)\.conv1\.", r"\1.conv_in.", name)
        name = name.replace("head.0", "norm_out").replace("head.2", "conv_out")
        name = name.replace("middle.0", "mid_block.resnets.0").replace("middle.2", "mid_block.resnets.1")
        name = name.replace("middle.1", "mid_block.attentions.0")
        at = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name)
        if at:
            number, per = int(at[1]), residual_blocks + 2
            inner = "upsamplers.0" if number % per == per - 1 else f"resnets.{number % per}"
            name = f"decoder.up_blocks.{number // per}.{inner}.{at[2]}"
        return name.replace("~", "")

    return {renamed(name): value for name, value in weights.items()}


def transformers_text(weights: Mapping[str, Tensor]) -> Weights:
    """With the names of UMT5EncoderModel, which has its table twice."""

    def renamed(name: str) -> str:
        name = name.replace("blocks.", "encoder.block.").replace("token_embedding", "shared")
        name = name.replace("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias")
        name = name.replace("attn.", "layer.0.SelfAttention.")
        name = name.replace("norm1", "layer.0.layer_norm").replace("norm2", "layer.1.layer_norm")
        for ours, theirs in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            name = name.replace(f"ffn.{ours}", f"layer.1.DenseReluDense.{theirs}")
        return "encoder.final_layer_norm.weight" if name == "norm.weight" else name

    found = {renamed(name): value for name, value in weights.items()}
    return found | {"encoder.embed_tokens.weight": found["shared.weight"].clone()}


def save_directory(weights: Weights, path: Path, stem: str, settings: Mapping[str, Any], shards: int) -> None:
    """A model's directory as `save_pretrained` writes it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(weights, path / f"{stem}.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(np.array_split(sorted(weights), shards)):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): weights[str(name)] for name in names}, path / file)
        index |= {str(name): file for name in names}
    (path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
