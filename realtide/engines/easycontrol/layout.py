"""Where things are in an EasyControl bundle: the one place that names its files and programs (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realtide.engines.easycontrol.programs import Programs

if TYPE_CHECKING:
    # Only for the types: the manifest of bundles needs more packages than replaying golden cases does.
    from realtide.bundle import Precision

WEIGHTS = "weights.safetensors"
TOKENIZER, POOLED_TOKENIZER = "tokenizer", "pooled-tokenizer"
"""Assets: T5's SentencePiece model; CLIP's byte pairs as a tokenizers file, or absent: one serves both."""

TRANSFORMER, VAE, TEXT, POOLED, PREVIEW = "transformer.", "vae.", "text.", "pooled.", "preview."
"""What is before the release's names in the weight file, by part."""

PROGRAMS = Programs("remember", "denoise", "encode", "decode", "preview", "text", "pooled")


def lora(kind: str) -> str:
    """What is before the names of a kind's LoRA in the weight file."""
    return f"lora.{kind}."


def graph_file(program: str, precision: Precision = "float32") -> str:
    """Path of a program's graph inside a bundle."""
    return f"onnx/{program}.onnx" if precision == "float32" else f"onnx/{precision}/{program}.onnx"
