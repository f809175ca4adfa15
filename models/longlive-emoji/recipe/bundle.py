"""Turn trained checkpoints into the bundle: weights, graphs, tokenizer, manifest (ours).

    bundle.py --vae vae.pt --model model.pt --tokenizer tokenizer.model --out models/longlive-emoji
              [--scores scores.json]
    bundle.py --out models/longlive-emoji --scores scores.json --manifest-only

Without --model the transformer and the text encoder keep random weights, as a test of everything else.
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
from safetensors.numpy import save_file
from scene import FRAMES_PER_SECOND, SIZE
from shapes import text_config, vae_config, video_config

from realtide.bundle import MANIFEST, write_manifest
from realtide.engines.longlive import export, torch_programs
from realtide.engines.longlive.int8 import quantize_passes
from realtide.engines.longlive.programs import Passes, Stages
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.weights import WeightFile

PARTS = ("transformer", "vae", "text")
SOURCES = [
    {
        "name": "Fluent Emoji Flat (Microsoft), npm package @iconify-json/fluent-emoji-flat 1.2.6",
        "licence": "MIT",
        "url": "https://github.com/microsoft/fluentui-emoji",
        "use": "pictures of 40 objects; all clips are rendered from them",
    },
]


def part_of(weights: WeightFile, part: str) -> dict[str, Array]:
    """A part's weights under the names that its module has."""
    return {name.removeprefix(f"{part}."): weights[name] for name in weights if name.startswith(f"{part}.")}


def write_graphs(out: Path, mean: list[float], std: list[float]) -> dict[str, Path]:
    """Export all programs from the stored weights; graph files by program."""
    weights = WeightFile(out / "weights.safetensors")
    directory = out / "onnx"
    directory.mkdir(parents=True, exist_ok=True)
    config, vae = video_config(), vae_config(mean, std)
    transformer = torch_programs.transformer(config.transformer, part_of(weights, "transformer"))
    passes: Passes[Path] = export.export_video(transformer, config, directory, prefix="transformer.")
    model = torch_programs.vae(vae, part_of(weights, "vae"))
    height, width = config.stream.height, config.stream.width
    decoder: Stages[Path] = export.export_decoder(model, height, width, directory, prefix="vae.")
    encoder: Stages[Path] = export.export_encoder(model, SIZE, SIZE, directory, prefix="vae.")
    text = torch_programs.text_encoder(text_config(), part_of(weights, "text"))
    return {
        "prompt": passes.prompt,
        "denoise": passes.denoise,
        "clean": passes.clean,
        "recache": passes.recache,
        **{f"{name}.int8": path for name, path in quantized(passes).items()},
        "decode_first": decoder.first,
        "decode_next": decoder.later,
        "encode_first": encoder.first,
        "encode_next": encoder.later,
        "text": export.export_text(text, directory / "text.onnx", prefix="text."),
    }


def quantized(passes: Passes[Path]) -> dict[str, Path]:
    """The int8 graphs of those passes that have one; they ask for the same weights."""
    made = quantize_passes(passes)
    return {"denoise": made.denoise, "clean": made.clean, "recache": made.recache}


def programs(graphs: dict[str, Path], out: Path) -> dict[str, dict[str, str]]:
    """The manifest's table; a program without an int8 graph has its float one there."""
    names = [name for name in graphs if not name.endswith(".int8")]
    return {
        name: {
            "float32": graphs[name].relative_to(out).as_posix(),
            "int8": graphs.get(f"{name}.int8", graphs[name]).relative_to(out).as_posix(),
        }
        for name in names
    }


def load_weights(vae: Path, model: Path | None) -> tuple[dict[str, Array], list[float], list[float]]:
    """All weights by their names in the bundle, in half precision, and the latents' mean and deviation."""
    saved = torch.load(vae, weights_only=True)
    parts = {"vae": saved["weights"]}
    if model is None:
        torch.manual_seed(0)
        parts["transformer"] = WanTransformer(video_config().transformer).state_dict()
        parts["text"] = TextEncoder(text_config()).state_dict()
    else:
        parts |= torch.load(model, weights_only=True)["weights"]
        # Rows for more pieces than the tokenizer has are never looked up.
        table = "token_embedding.weight"
        parts["text"][table] = parts["text"][table][: text_config().vocab]
    weights: dict[str, Array] = {}
    for part in PARTS:
        for name, value in parts[part].items():
            array = value.float().numpy()
            if not np.isfinite(array.astype(np.float16)).all():
                raise ValueError(f"weight {part}.{name} is not finite in half precision")
            weights[f"{part}.{name}"] = array.astype(np.float16)
    mean = saved.get("mean", [0.0] * vae_config().latent)
    std = saved.get("std", [1.0] * vae_config().latent)
    return weights, mean, std


def retell(directory: Path, scores: dict[str, Any]) -> None:
    """Write the manifest anew with other scores; weights and graphs stay."""
    values = yaml.safe_load((directory / MANIFEST).read_text(encoding="utf-8"))
    for name in ("files", "format"):
        del values[name]
    write_manifest(directory, values | {"scores": scores})


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--vae", type=Path)
    parse.add_argument("--model", type=Path)
    parse.add_argument("--tokenizer", type=Path)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--version", default="1.0.0", help="semantic version of the bundle")
    parse.add_argument("--created", default="2026-11-25", help="YYYY-MM-DD")
    parse.add_argument("--scores", type=Path, help="what evaluate.py wrote")
    parse.add_argument("--keep-graphs", action="store_true", help="OUT has them: they hold no weights")
    parse.add_argument("--manifest-only", action="store_true", help="keep OUT's weights and graphs")
    args = parse.parse_args()
    scores = json.loads(args.scores.read_text()) if args.scores else {}
    if args.manifest_only:
        retell(args.out, scores)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    weights, mean, std = load_weights(args.vae, args.model)
    save_file(weights, args.out / "weights.safetensors")
    shutil.copyfile(args.tokenizer, args.out / "tokenizer.model")
    graphs = {p.stem: p for p in (args.out / "onnx").glob("*.onnx")} if args.keep_graphs else {}
    if not graphs:
        graphs = write_graphs(args.out, mean, std)
    config = video_config()
    write_manifest(
        args.out,
        {
            "engine": "longlive",
            "name": "longlive-emoji",
            "version": args.version,
            "description": "Emoji that move over a plain background as the prompt says, 64x64 pixels.",
            "licence": "MIT",
            "architecture": {
                "transformer": config.transformer.to_dict(),
                "stream": config.stream.to_dict(),
                "vae": vae_config(mean, std).to_dict(),
                "text": text_config().to_dict(),
                "video": {"frames_per_second": FRAMES_PER_SECOND},
            },
            "precisions": ["float32", "int8"],
            "weights": "weights.safetensors",
            "programs": programs(graphs, args.out),
            "assets": {"tokenizer": "tokenizer.model"},
            "scores": scores,
            "provenance": {
                "recipe": "models/longlive-emoji/recipe/README.md",
                "created": args.created,
                "data": SOURCES,
            },
            "unverified": ["README.md", "recipe"],
        },
    )


if __name__ == "__main__":
    main()
