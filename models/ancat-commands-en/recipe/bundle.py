"""Turn a trained checkpoint into the bundle: weights, graphs, tokenizer, manifest (ours).

    bundle.py --checkpoint RUN/final.pt --cmvn FILE --tokenizer FILE --out models/ancat-commands-en
    [--scores scores.json]
              [--start-offset-ms X --end-offset-ms Y]

Run it once with no offsets, calibrate word times on the development strings with evaluate.py, and run it
again with them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pool import load_pool

from realtide.bundle import MANIFEST, write_manifest
from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.export import write_bundle
from realtide.engines.ancat.offline import windows_of

SOURCES = [
    {
        "name": "Free Spoken Digit Dataset (Jakobovski and contributors), commit 26eb9aaf",
        "licence": "CC-BY-SA-4.0",
        "url": "https://github.com/Jakobovski/free-spoken-digit-dataset",
        "use": "digits and digit strings",
    },
    {
        "name": "Picovoice speech-to-intent-benchmark, commit 47b1ca63",
        "licence": "Apache-2.0",
        "url": "https://github.com/Picovoice/speech-to-intent-benchmark",
        "use": "coffee orders",
    },
    {
        "name": "Picovoice wake-word-benchmark, commit 84919190",
        "licence": "Apache-2.0",
        "url": "https://github.com/Picovoice/wake-word-benchmark",
        "use": "wake phrases",
    },
    {
        "name": "Asterisk core sounds, English: voice of Allison Smith, financed by Digium, Inc.",
        "licence": "CC-BY-SA-3.0",
        "url": "https://packages.debian.org/bookworm/asterisk-core-sounds-en",
        "use": "telephone prompts",
    },
    {
        "name": "Synthetic speech: espeak-ng; flite (Carnegie Mellon University); Piper, voice en_US-joe",
        "licence": "see the model card",
        "use": "a supplement: a fifth of the draws",
    },
]


def scores_of(path: Path | None) -> dict[str, Any]:
    """What the manifest tells of evaluate.py's results."""
    scores: dict[str, Any] = {}
    for name, values in json.loads(path.read_text()).items() if path else ():
        if isinstance(values, dict):
            scores[name] = {
                "utterances": values["utterances"],
                "word_error_rate": round(values["rate"], 5),
                "interval_95": [round(edge, 5) for edge in values["interval"]],
                "exact": round(values["exact"], 5),
            }
            if values["slots"] is not None:
                scores[name]["slots"] = round(values["slots"], 5)
    return scores


def retell(
    directory: Path, scores: dict[str, Any], word_times: dict[str, float], search: dict[str, float]
) -> None:
    """Write the manifest anew with other scores, word times and search; weights and graphs stay."""
    values = yaml.safe_load((directory / MANIFEST).read_text(encoding="utf-8"))
    for name in ("files", "format"):
        del values[name]
    values["architecture"]["word_times"] = word_times
    values["architecture"]["search"] = search
    values["scores"] = scores or values["scores"]
    write_manifest(directory, values)


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--checkpoint", type=Path, required=True)
    parse.add_argument("--cmvn", type=Path, required=True)
    parse.add_argument("--tokenizer", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--name", default="ancat-commands-en")
    parse.add_argument("--version", default="1.4.0", help="semantic version of the bundle")
    parse.add_argument("--created", default="2026-11-26", help="YYYY-MM-DD")
    parse.add_argument("--scores", type=Path, help="what evaluate.py wrote")
    parse.add_argument("--calibration", type=Path, nargs="*", default=[], help="development pools for int8")
    parse.add_argument(
        "--step-frames",
        type=int,
        default=16,
        help="most new frames of a stream, and nodes of a layer, in a call (default: %(default)s)",
    )
    parse.add_argument("--start-offset-ms", type=float, default=0.0)
    parse.add_argument("--end-offset-ms", type=float, default=0.0)
    parse.add_argument(
        "--blank-bias",
        type=float,
        default=0.0,
        help="added to the joiner's logit of blank, from development sets",
    )
    parse.add_argument(
        "--repeat-gain",
        type=float,
        default=0.0,
        help="nats for a token that follows itself, from development sets",
    )
    parse.add_argument(
        "--repeat-frames",
        type=int,
        default=6,
        help="encoder frames after which it may (default: %(default)s)",
    )
    parse.add_argument(
        "--context-frames",
        type=int,
        help="encoder frames after which the predictor forgets a token, from development streams",
    )
    parse.add_argument("--manifest-only", action="store_true", help="keep OUT's weights and graphs")
    args = parse.parse_args()
    word_times = {"start_offset_ms": args.start_offset_ms, "end_offset_ms": args.end_offset_ms}
    search: dict[str, float] = {"repeat_gain": args.repeat_gain, "repeat_frames": args.repeat_frames}
    if args.context_frames is not None:
        search["context_frames"] = args.context_frames
    if args.manifest_only:
        retell(args.out, scores_of(args.scores), word_times, search)
        return
    saved = torch.load(args.checkpoint, weights_only=True)
    config = EncoderConfig.from_dict(saved["config"])
    weights = {name: value.numpy() for name, value in saved["weights"].items()}
    bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"{args.checkpoint}: weight {bad[0]} is not finite")
    weights["joiner.out.bias"][0] += args.blank_bias
    cmvn = np.load(args.cmvn)
    calibration = [
        windows_of(
            torch.from_numpy((np.asarray(pool.mel(record), np.float32) - cmvn[0]) / cmvn[1])[None], config
        )[0].numpy()
        for pool in map(load_pool, args.calibration)
        for record in pool.records[::3][:16]
    ]
    scores = scores_of(args.scores)
    write_bundle(
        args.out,
        config,
        weights,
        cmvn[0],
        cmvn[1],
        args.tokenizer,
        {
            "name": args.name,
            "version": args.version,
            "description": "English commands: digits, coffee orders, wake phrases, telephone prompts.",
            "licence": "CC-BY-SA-4.0",
            "limits": {"language_codes": ["en-US"], "max_utterance_ms": 60000},
            "scores": scores,
            "provenance": {
                "recipe": "models/ancat-commands-en/recipe/README.md",
                "created": args.created,
                "data": SOURCES,
            },
            "unverified": ["README.md", "recipe"],
        },
        step_frames=args.step_frames,
        word_times=word_times,
        search=search,
        calibration=calibration,
    )


if __name__ == "__main__":
    main()
