"""int8 against float32 graphs of one bundle: speed of the encoder, and word errors where pools are given.

Speed is paired as in encoder_cost.py. Word errors come from the serving engine itself, fed with the pools'
recordings (all streams together, no endpointing), once with each precision. A bundle without int8 graphs is
told so, which is no failure.

    python benchmarks/int8.py --bundle BUNDLE [--pool POOL ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from realtide.bench import audio, report
from realtide.bench.encoder import EncoderBench, windows_of
from realtide.bundle import load_bundle
from realtide.engines.ancat.engine import load
from realtide.engines.ancat.types import Audio, EndpointRules, Final, Finish, SpeechOptions

RATE = 16000
OUT = Path(__file__).parent / "results" / "int8.json"
BATCH = 16


def speed(bundle: Path, streams: int, rounds: int) -> dict[str, Any]:
    """Encoder time per audio second of both precisions, and the median ratio of paired rounds."""
    benches = {name: EncoderBench.of_bundle(bundle, streams, name) for name in ("float32", "int8")}
    sound = audio.loop(audio.recordings(None), RATE)
    windows = windows_of(sound, RATE, bundle, streams, 50)
    totals: dict[str, list[float]] = {name: [] for name in benches}
    for number in range(rounds + 1):
        order = list(benches) if number % 2 else list(benches)[::-1]
        for name in order:
            spent = benches[name].play(windows, 1).total
            if number:  # the first is warm-up
                totals[name].append(spent)
    seconds = streams * windows.shape[1] * 0.04
    ratio = float(np.median(np.array(totals["int8"]) / np.array(totals["float32"])))
    per_second = {name: round(float(np.median(found)) / seconds * 1000, 3) for name, found in totals.items()}
    return {"streams": streams, "ms_per_audio_second": per_second, "int8_by_float32": round(ratio, 3)}


def transcribe(bundle: Path, precision: str, sounds: list[Any]) -> list[str]:
    """Texts of recordings (float32, 16 kHz) by the serving engine."""
    engine = load(bundle, slots=BATCH, max_batch=BATCH, precision=precision)
    rules = EndpointRules(enabled=False, max_utterance_ms=engine.info.max_utterance_ms)
    options = SpeechOptions(sample_rate=RATE, interim_results=False, endpointing=rules)
    texts = []
    for first in track(range(0, len(sounds), BATCH), precision, console=Console(stderr=True), transient=True):
        sessions = []
        for samples in sounds[first : first + BATCH]:
            session = engine.open(options)
            session.push(Audio(samples, 0.0))
            session.push(Finish())
            sessions.append(session)
        found: dict[int, list[str]] = {id(session): [] for session in sessions}
        while ready := [session for session in sessions if session.runnable()]:
            events = engine.step(ready, lambda stage, seconds, batch: None)
            for session, given in zip(ready, events, strict=True):
                found[id(session)] += [event.text for event in given if isinstance(event, Final)]
        for session in sessions:
            texts.append(" ".join(text for text in found[id(session)] if text))
            session.close()
    return texts


def errors(bundle: Path, pool: Path) -> dict[str, Any]:
    """Word error rates of both precisions, in percent, and utterances whose texts differ."""
    import jiwer

    rows = [json.loads(line) for line in (pool / "index.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["sure"] and row["text"] and row["samples"]]
    if not rows:
        raise SystemExit(f"{pool} was written without audio")
    stored = np.load(pool / "audio.npy", mmap_mode="r")
    sounds = [
        np.asarray(stored[row["sample_offset"] : row["sample_offset"] + row["samples"]], np.float32) / 32768
        for row in rows
    ]
    texts = {name: transcribe(bundle, name, sounds) for name in ("float32", "int8")}
    spoken = [row["text"] for row in rows]
    return {
        "utterances": len(rows),
        "wer_percent": {name: round(100 * jiwer.wer(spoken, found), 3) for name, found in texts.items()},
        "texts_that_differ": sum(a != b for a, b in zip(*texts.values(), strict=True)),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--pool", type=Path, nargs="*", default=[], help="pools of the recipe, with audio")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    precisions = bundle.manifest.precisions
    if not {"int8", "float32"} <= set(precisions):
        print(f"{bundle.manifest.name} has graphs for {', '.join(precisions)} only: nothing to compare")
        return
    found = {
        "bundle": bundle.manifest.name,
        "speed": [speed(arguments.bundle, streams, arguments.rounds) for streams in (1, 16)],
        "graphs_bytes": {name: bundle.graph("encoder", name).stat().st_size for name in ("float32", "int8")},
        "pools": {pool.name: errors(arguments.bundle, pool) for pool in arguments.pool},
    }
    report.write(arguments.out, report.envelope("int8", found))
    print(json.dumps(found, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
