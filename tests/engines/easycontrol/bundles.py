"""A small image bundle with random weights, written as a real one is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from realtide.bundle import write_manifest
from realtide.engines.easycontrol import loras
from realtide.engines.easycontrol.export import export_all
from realtide.engines.easycontrol.layout import PROGRAMS, TOKENIZER, lora
from realtide.engines.runtime.program import Array
from tests.engines.easycontrol import small

LIMITS = {
    "size": [32, 32], "side": [16, 64], "pixels": 4096, "steps": 10, "conditions": 2, "guidance": [0, 10],
}  # fmt: skip


def write_bundle(directory: Path) -> Path:
    """Write the bundle into a new directory."""
    (directory / "onnx").mkdir(parents=True)
    made = small.modules()
    weights: dict[str, Array] = {}
    for prefix, module in made.parts().items():
        weights |= {prefix + name: value.numpy() for name, value in module.state_dict().items()}
    config = small.LONG
    for kind, stacked in small.adapters().items():
        for block, part, name in loras.names(config.transformer):
            for way in ("down", "up"):
                weights[f"{lora(kind)}{name}.{way}.weight"] = stacked[f"{way}_{block}"][part]
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        directory / "weights.safetensors",
    )
    shutil.copy(small.TOKENIZER, directory / "tokenizer.model")
    export_all(made, config, small.POOLED, directory / "onnx")
    names = vars(PROGRAMS).values()
    write_manifest(
        directory,
        {
            "engine": "easycontrol",
            "name": directory.name,
            "version": "1.0.0",
            "description": "Random weights.",
            "licence": "Apache-2.0",
            "architecture": {
                "transformer": config.transformer.to_dict(),
                "conditions": config.conditions.to_dict(),
                "sampler": config.sampler.to_dict(),
                "vae": config.vae.to_dict(),
                "text": small.TEXT.to_dict(),
                "pooled": small.POOLED.to_dict(),
                "preview": config.preview,
            },
            "limits": LIMITS,
            "precisions": ["float32"],
            "weights": "weights.safetensors",
            "programs": {name: {"float32": f"onnx/{name}.onnx"} for name in names},
            "assets": {TOKENIZER: "tokenizer.model"},
            "provenance": {"recipe": "random", "created": "2026-11-25"},
        },
    )
    return directory
