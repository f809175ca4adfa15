"""Turn trained checkpoints into the bundle: weights, graphs, tokenizer, manifest (ours).

bundle.py --vae vae.pt --model model.pt --canny canny.pt --subject subject.pt --tokenizer tokenizer.model
          --out models/easycontrol-emoji [--scores scores.json]
bundle.py --out models/easycontrol-emoji [--scores scores.json] --manifest-only
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pictures import SIDE
from safetensors.numpy import save_file
from shapes import image_config, pooled_config, text_config, vae_config

from realtide.bundle import MANIFEST, write_manifest
from realtide.engines.easycontrol import export, torch_programs
from realtide.engines.easycontrol.graphs import INT8
from realtide.engines.easycontrol.layout import (
    POOLED,
    PREVIEW,
    PROGRAMS,
    TEXT,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    lora,
)
from realtide.engines.easycontrol.tokenizer import PromptTokenizer
from realtide.engines.runtime.int8 import quantize_graph
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.quantize import pack_rows
from realtide.engines.runtime.weights import WeightFile

PARTS = {"transformer": TRANSFORMER, "text": TEXT, "pooled": POOLED}
PACKED = 2**14
"""Elements from which on a tensor is stored in int8 with a scale for each row."""
KINDS = ("canny", "subject")
SOURCES = [
    {
        "name": "Fluent Emoji Flat (Microsoft), npm package @iconify-json/fluent-emoji-flat 1.2.6",
        "licence": "MIT",
        "url": "https://github.com/microsoft/fluentui-emoji",
        "use": "pictures in the style called flat",
    },
    {
        "name": "Noto Emoji (Google), npm package @iconify-json/noto 1.2.9",
        "licence": "Apache-2.0",
        "url": "https://github.com/googlefonts/noto-emoji",
        "use": "pictures in the style called noto",
    },
]
LIMITS = {
    "size": [SIDE, SIDE],
    "side": [32, 128],
    "pixels": 128 * 128,
    "steps": 50,
    "conditions": 3,
    "weight": [0, 2],
}


def load_weights(vae: Path, model: Path, loras: dict[str, Path]) -> tuple[dict[str, Array], dict[str, float]]:
    """All weights by their names in the bundle, and the latents' normalisation.

    Large matrices and kernels take a byte an element; the rest, the last projection too, two.
    """
    saved = torch.load(vae, weights_only=True)
    found = {VAE + name: value for name, value in saved["weights"].items()}
    found |= {PREVIEW + name: saved[f"preview.{name}"] for name in ("weight", "bias")}
    for name, value in torch.load(model, weights_only=True)["weights"].items():
        part, _, rest = name.partition(".")
        found[PARTS[part] + rest] = value
    for kind, path in loras.items():
        trained = torch.load(path, weights_only=True)["weights"]
        found |= {lora(kind) + name: value for name, value in trained.items()}
    weights: dict[str, Array] = {}
    for name, value in found.items():
        array = value.float().numpy().astype(np.float16)
        if not np.isfinite(array).all():
            raise ValueError(f"weight {name} is not finite in half precision")
        if array.ndim > 1 and array.size >= PACKED:
            weights |= pack_rows(name, value.float().numpy())
        else:
            weights[name] = np.ascontiguousarray(array)
    return weights, {"scaling": saved["scaling"], "shift": saved["shift"]}


def graph_files(out: Path) -> dict[str, Any]:
    """Write int8 variants beside the float graphs of `out`; what the manifest says of both."""
    table = {}
    for name in vars(PROGRAMS).values():
        plain = narrow = f"onnx/{name}.onnx"
        if name in INT8:
            narrow = f"onnx/{name}.int8.onnx"
            quantize_graph(out / plain, out / narrow)
        table[name] = {"float32": plain, "int8": narrow}
    return {"precisions": ["float32", "int8"], "programs": table}


def retell(directory: Path, version: str, scores: dict[str, Any]) -> None:
    """Write int8 graphs and the manifest anew; the rest stays, and scores do if none are given."""
    values = yaml.safe_load((directory / MANIFEST).read_text(encoding="utf-8"))
    for name in ("files", "format"):
        del values[name]
    changed = {"version": version, "scores": scores or values["scores"]}
    write_manifest(directory, values | graph_files(directory) | changed)


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vae", "model", "tokenizer", *KINDS):
        parse.add_argument(f"--{name}", type=Path)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--version", default="1.1.0", help="semantic version of the bundle")
    parse.add_argument("--created", default="2026-11-25", help="YYYY-MM-DD")
    parse.add_argument("--scores", type=Path, help="what evaluate.py wrote")
    parse.add_argument("--keep-graphs", action="store_true", help="OUT has them: they hold no weights")
    parse.add_argument("--manifest-only", action="store_true", help="keep OUT's weights and float graphs")
    args = parse.parse_args()
    scores = json.loads(args.scores.read_text()) if args.scores else {}
    if args.manifest_only:
        retell(args.out, args.version, scores)
        return
    graphs = args.out / "onnx"
    graphs.mkdir(parents=True, exist_ok=True)
    weights, normal = load_weights(args.vae, args.model, {kind: getattr(args, kind) for kind in KINDS})
    save_file(weights, args.out / "weights.safetensors")
    shutil.copyfile(args.tokenizer, args.out / "tokenizer.model")
    config = image_config(vae_config(**normal))
    vocabulary = PromptTokenizer(args.tokenizer, 1).vocabulary
    text, pooled = text_config(vocabulary), pooled_config(vocabulary)
    names = tuple(vars(PROGRAMS).values())
    if not (args.keep_graphs and all((graphs / f"{name}.onnx").is_file() for name in names)):
        made = torch_programs.loaded(config, text, pooled, WeightFile(args.out / "weights.safetensors"))
        export.export_all(made, config, pooled, graphs)
    write_manifest(
        args.out,
        {
            "engine": "easycontrol",
            "name": "easycontrol-emoji",
            "version": args.version,
            "description": "Emoji from a prompt, from edges and from another style's picture, 64x64 pixels.",
            "licence": "MIT AND Apache-2.0",
            "architecture": {
                "transformer": config.transformer.to_dict(),
                "conditions": config.conditions.to_dict(),
                "sampler": config.sampler.to_dict(),
                "vae": config.vae.to_dict(),
                "text": text.to_dict(),
                "pooled": pooled.to_dict(),
                "preview": config.preview,
            },
            "limits": LIMITS,
            "weights": "weights.safetensors",
            **graph_files(args.out),
            "assets": {TOKENIZER: "tokenizer.model"},
            "scores": scores,
            "provenance": {
                "recipe": "models/easycontrol-emoji/recipe/README.md",
                "created": args.created,
                "data": SOURCES,
            },
            "unverified": ["README.md", "recipe"],
        },
    )


if __name__ == "__main__":
    main()
