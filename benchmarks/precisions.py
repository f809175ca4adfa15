"""What each precision costs the small bundles in words, motion and edges, and what int8 gains in time.

Besides: how far golden cases are from their reference in it.

Scores are those of the bundles' recipes, through the engines that serve them: float32 and int8 with the
bundle's own graphs; others with a form of their graphs that a processor computes, rounding every result
(`realtide/engines/runtime/host_form.py`). Times are of int8 on one core against float32, taking turns. A
part whose data is not given is left out and named.

    python benchmarks/precisions.py --eval DATA/eval --icons ICONS --pictures RUN/pictures.npz \
           [--bundle NAME ...] [--precision int8 ...] [--part times scores golden] [--out FILE] [--table]

`--eval`: test sets, by `prepare.py --only-tests` of models/ancat-commands-en/recipe; `--icons`: the folder of
both icon packages, `--pictures`: as in models/easycontrol-emoji/recipe. What the file has of the same bundle
and is not measured now, it keeps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from realtide import golden_precisions
from realtide.bench import audio, precisions, report
from realtide.bench.encoder import EncoderBench, windows_of
from realtide.bundle import Bundle, BundleError, Precision, load_bundle
from realtide.engines.ancat.frontend import Float32
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.programs import FrameDecoder
from realtide.engines.runtime.program import ProgramError
from realtide.precision_scores import FILE, entry_of, identity
from realtide.variants import VariantError

ROOT = Path(__file__).resolve().parents[1]
SETS = ("digits_test", "strings_test", "coffee_test", "wakeword_test")
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "float16", "bfloat16", "float8")
PROMPTS = ("a red apple moves to the right on a blue background", "a red apple moves up on a blue background")


def moment() -> dict[str, str]:
    """When and at which commit."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": report.commit(), "date": date}


def paired(runs: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, float], float]:
    """Median milliseconds of both, and the median over rounds of int8 by float32; they take turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            seconds = runs[name]()
            if number:  # the first warms up
                spent[name].append(seconds)
    ratio = float(np.median(np.array(spent["int8"]) / np.array(spent["float32"])))
    return {name: round(1000 * float(np.median(all_)), 3) for name, all_ in spent.items()}, round(ratio, 3)


def speech_times(bundle: Path, rounds: int) -> list[dict[str, Any]]:
    """The encoder, per second of audio."""
    found = []
    for streams in (1, 16):
        benches = {name: EncoderBench.of_bundle(bundle, streams, name) for name in precisions.OWN}
        windows = windows_of(audio.loop(audio.recordings(None), 16000), 16000, bundle, streams, 50)
        length = streams * windows.shape[1] * 0.04

        def run(bench: EncoderBench, windows: Float32 = windows, length: float = length) -> float:
            return bench.play(windows, 1).total / length

        each, ratio = paired({name: partial(run, bench) for name, bench in benches.items()}, rounds)
        what = f"the encoder, {streams} stream{'s' * (streams > 1)}"
        found.append({"what": what, "ms_per_audio_second": each, "int8_by_float32": ratio})
    return found


class Video:
    """One precision's stream."""

    def __init__(self, bundle: Path, precision: str) -> None:
        self.engine: LongLiveEngine = load(bundle, slots=1, precision=precision)
        self.cache = self.engine._parts.caches.first

    def begin(self, prompt: str, seed: int) -> None:
        """A new video."""
        config = self.engine._parts.config
        self.stream = VideoStream(config, self.cache.programs, self.cache.keys, seed)
        self.stream.set_prompt(self.engine._parts.embed(prompt))
        self.decoder = FrameDecoder(self.cache.decoder)

    def block(self) -> float:
        """The next block, which is kept; seconds."""
        begun = time.perf_counter()
        self.latents = self.stream.block()
        return time.perf_counter() - begun

    def frames(self) -> Any:
        """The last block's frames, in 0..1."""
        made = np.concatenate([self.decoder.decode(latent) for latent in self.latents])
        return np.clip((made + 1) / 2, 0, 1)


def video_times(bundle: Path, rounds: int) -> list[dict[str, Any]]:
    """A block, and how far the same video differs."""
    sides = {name: Video(bundle, short) for name, short in (("float32", "fp32"), ("int8", "int8"))}
    spent, psnr, first = [], [], []
    for seed, prompt in enumerate(PROMPTS):
        for side in sides.values():
            side.begin(prompt, seed)
        for number in range(rounds + 2):
            seconds = {name: sides[name].block() for name in sorted(sides, reverse=bool(number % 2))}
            a, b = sides["float32"], sides["int8"]
            if not number:
                first.append(float(np.linalg.norm(a.latents - b.latents) / np.linalg.norm(a.latents)))
            if number > 1:  # two warm up
                spent.append([seconds["float32"], seconds["int8"]])
            errors = np.mean((a.frames() - b.frames()) ** 2, axis=(1, 2, 3))
            psnr += [float(-10 * np.log10(max(e, 1e-12))) for e in errors]
    pairs = np.array(spent)
    return [
        {
            "what": "a block",
            "ms_per_block": dict(zip(sides, np.round(1000 * np.median(pairs, 0), 2).tolist(), strict=True)),
            "int8_by_float32": round(float(np.median(pairs[:, 1] / pairs[:, 0])), 3),
            "first_block_rel_l2": [round(value, 5) for value in first],
            "psnr_db_median": round(float(np.median(psnr)), 2),
        }
    ]


def image_times(bundle: Path, rounds: int) -> list[dict[str, Any]]:
    """A denoising step on the sample of quality reports (`easycontrol.graphs.samples`)."""
    from realtide.engines.easycontrol.graphs import samples
    from realtide.engines.runtime.ort import OrtOptions, OrtProgram
    from realtide.engines.runtime.weights import WeightFile
    from realtide.variants import manifest_values

    loaded = load_bundle(bundle)
    feeds = samples(manifest_values(loaded))["denoise"].calls[0]
    weights, options = WeightFile(loaded.weights), OrtOptions(intra_op_num_threads=1)
    programs = {
        name: OrtProgram(loaded.graph("denoise", name), weights, {}, options) for name in precisions.OWN
    }

    def run(program: OrtProgram) -> float:
        begun = time.perf_counter()
        for _ in range(5):
            program.run(feeds)
        return (time.perf_counter() - begun) / 5

    each, ratio = paired({name: partial(run, program) for name, program in programs.items()}, rounds)
    shape = list(feeds["latents"].shape)
    return [{"what": "a step", "latents": shape, "ms_per_step": each, "int8_by_float32": ratio}]


def golden(results: dict[str, Any], wanted: Sequence[Precision], now: dict[str, str]) -> None:
    """Replay every golden case of the engines in some precisions; worst tensors into `results`."""
    for engine in golden_precisions.ENGINES:
        kept = results["golden"].setdefault(engine, {})
        for precision in wanted:
            print(f"golden cases of {engine} in {precision}", file=sys.stderr)
            found = golden_precisions.replayed(engine, precision, ROOT / "tests" / "golden")
            assert isinstance(found, dict), found
            kept[precision] = {**found, **now}


TIMES = {"ancat": speech_times, "longlive": video_times, "easycontrol": image_times}


def score(bundle: Bundle, where: Path, precision: str, data: argparse.Namespace) -> dict[str, Any] | str:
    """Scores of a bundle by its recipe's evaluation, or why there are none.

    Args:
        bundle: whose recipe.
        where: the bundle that is run.
        precision: of its graphs, by the name that engines know.
        data: the command's options.
    """
    recipe = bundle.directory / "recipe"
    engine = bundle.manifest.engine
    if engine == "ancat":
        if data.eval is None:
            return "needs --eval"
        more = ["--sets", *(str(data.eval / name) for name in SETS)]
    elif engine == "longlive":
        if data.icons is None:
            return "needs --icons"
        icons = data.icons / "fluent-emoji-flat" / "icons.json"
        more = ["--icons", str(icons), "--part", "follow", "--triples", str(data.count or 89)]
    else:
        if data.pictures is None:
            return "needs --pictures"
        more = ["--pictures", str(data.pictures), "--count", str(data.count or 95)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.json"
        call = [sys.executable, "evaluate.py", "--bundle", str(where.resolve()), "--out", str(out)]
        subprocess.run([*call, "--precision", precision, *more], cwd=recipe, check=True, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return {name: value for name, value in found.items() if name not in ("commit", "precision", "device")}


def scores_of(bundle: Bundle, precision: Precision, data: argparse.Namespace) -> dict[str, Any] | str:
    """Scores of a bundle in a precision, or why there are none."""
    short = {"float32": "fp32"} if bundle.manifest.engine == "ancat" else {}
    if precision in precisions.OWN:
        if precision not in bundle.manifest.precisions:
            return "the bundle has no such graphs"
        return score(bundle, bundle.directory, short.get(precision, precision), data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = precisions.host_bundle(bundle, precision, Path(folder))
        except (VariantError, ProgramError) as error:
            return str(error)
        return score(bundle, made, short.get("float32", "float32"), data)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, nargs="*", help="default: all below models/")
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument(
        "--part", nargs="*", default=["times", "scores", "golden"], choices=["times", "scores", "golden"]
    )
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--icons", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--count", type=int, help="fewer prompts or names, to try it out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument(
        "--table", action="store_true", help="print the table of what the file has; measure nothing"
    )
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    results = {"bundles": results.get("bundles", {}), "golden": results.get("golden", {})}
    if arguments.table:
        print(precisions.table(results, PRECISIONS))
        print(precisions.golden_table(results, PRECISIONS), end="")
        return
    for directory in arguments.bundle or sorted(path.parent for path in ROOT.glob("models/*/manifest.yaml")):
        try:
            bundle = load_bundle(directory)
        except BundleError as error:
            raise SystemExit(str(error)) from None
        manifest = bundle.manifest
        entry = entry_of(results, bundle) or {
            "engine": manifest.engine,
            **identity(bundle),
            "times": [],
            "scores": {},
            "left_out": {},
        }
        results["bundles"][manifest.name] = entry
        now = moment()
        if "times" in arguments.part and "int8" in manifest.precisions:
            entry["times"] = [{**one, **now} for one in TIMES[manifest.engine](directory, arguments.rounds)]
        for precision in arguments.precision if "scores" in arguments.part else ():
            print(f"{manifest.name} in {precision}", file=sys.stderr)
            found = scores_of(bundle, precision, arguments)
            if isinstance(found, str):
                entry["left_out"][precision] = found
                entry["scores"].pop(precision, None)
            else:
                entry["scores"][precision] = {**found, **now}
                entry["left_out"].pop(precision, None)
        report.write(arguments.out, report.envelope("precisions", results))
    if "golden" in arguments.part:
        golden(results, arguments.precision, moment())
        report.write(arguments.out, report.envelope("precisions", results))
    print(precisions.table(results, PRECISIONS), end="")
    for name, entry in results["bundles"].items():
        for precision, why in entry["left_out"].items():
            print(f"{name} in {precision} left out: {why}")


if __name__ == "__main__":
    main()
