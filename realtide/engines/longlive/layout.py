"""Where things are in a LongLive bundle: the one place that names its files and programs (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realtide.engines.longlive.programs import Passes, Stages

if TYPE_CHECKING:
    # Only for the types: the manifest of bundles needs more packages than replaying golden cases does.
    from realtide.bundle import Precision

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.model"
TRANSFORMER, VAE, TEXT = "transformer.", "vae.", "text."
"""What is before the release's names in the weight file, by section of the manifest's `architecture`."""

PASSES = Passes("prompt", "denoise", "clean", "recache")
DECODE = Stages("decode_first", "decode_next")
ENCODE = Stages("encode_first", "encode_next")
TEXT_GRAPH = "text"
PROGRAMS = (
    *(PASSES.prompt, PASSES.denoise, PASSES.clean, PASSES.recache),
    *(DECODE.first, DECODE.later, ENCODE.first, ENCODE.later),
    TEXT_GRAPH,
)
"""All programs; a server asks for those that it uses."""


def graph_file(program: str, precision: Precision = "float32") -> str:
    """Path of a program's graph inside a bundle."""
    return f"onnx/{program}.onnx" if precision == "float32" else f"onnx/{precision}/{program}.onnx"
