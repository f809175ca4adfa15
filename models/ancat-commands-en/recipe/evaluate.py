"""Score a bundle on prepared test sets, through the very engine that serves it (ours).

    evaluate.py --bundle models/ancat-commands-en --sets EVAL/digits_test ... --out scores.json

Every utterance is a streaming session of its own with the server's default options; finals are joined. Where
word times are known exactly (digit strings), the offsets between them and the times that the engine reports
are summarised too: on development strings they calibrate the manifest's `word_times`, on test strings they
are scores.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pool import Pool, Record, load_pool
from score import score

from realtide.bench import report
from realtide.engines.ancat.engine import AncatEngine, load
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.types import Audio, Final, Finish, SpeechOptions, Word

RATE = 16000
SLOTS = 32
PIECE = RATE // 10  # samples per push


def transcribe(
    engine: AncatEngine, pool: Pool, options: SpeechOptions
) -> tuple[dict[str, str], dict[str, list[Word]], list[float]]:
    """Texts and words by utterance name, and every utterance's mean lookahead in seconds."""
    waiting = list(pool.records)
    live: list[tuple[Record, SpeechSession, list[Final]]] = []
    texts: dict[str, str] = {}
    words: dict[str, list[Word]] = {}
    lookahead: list[float] = []
    while waiting or live:
        while waiting and len(live) < SLOTS:
            record = waiting.pop()
            session = engine.open(options)
            samples = pool.samples(record)
            for start in range(0, len(samples), PIECE):
                session.push(Audio(samples[start : start + PIECE], 0.0))
            session.push(Finish())
            live.append((record, session, []))
        results = engine.step([session for _, session, _ in live], lambda *_: None)
        for (_, _, finals), events in zip(live, results, strict=True):
            finals.extend(event for event in events if isinstance(event, Final))
        for record, session, finals in [entry for entry in live if entry[1].done]:
            texts[record.name] = " ".join(final.text for final in finals if final.text)
            words[record.name] = [word for final in finals for word in final.words]
            lookahead.extend(final.lookahead_mean for final in finals)
            session.close()
        live = [entry for entry in live if not entry[1].done]
    return texts, words, lookahead


def word_times(pool: Pool, words: dict[str, list[Word]]) -> dict[str, float] | None:
    """Reported minus true times [ms] of words where every word was recognized; None without any."""
    starts: list[float] = []
    ends: list[float] = []
    for record in pool.records:
        found = words[record.name]
        if record.words and [word.text for word in found] == [text for text, _, _ in record.words]:
            starts += [
                1000 * (word.start - start) for word, (_, start, _) in zip(found, record.words, strict=True)
            ]
            ends += [1000 * (word.end - end) for word, (_, _, end) in zip(found, record.words, strict=True)]
    if not starts:
        return None
    out: dict[str, float] = {"words": len(starts)}
    for name, values in (("start", starts), ("end", ends)):
        out |= {
            f"{name}_median_ms": round(float(np.median(values)), 1),
            f"{name}_median_absolute_ms": round(float(np.median(np.abs(values))), 1),
            f"{name}_p90_absolute_ms": round(float(np.percentile(np.abs(values), 90)), 1),
        }
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sets", type=Path, nargs="+", required=True, help="pools with audio")
    parser.add_argument("--out", type=Path, help="JSON file to write; else standard output")
    parser.add_argument("--bias", type=float, default=0.0, help="lookahead bias")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", help="run what GPUs run, by PyTorch, there: cpu or cuda:0")
    args = parser.parse_args()
    engine = load(
        args.bundle,
        slots=SLOTS,
        max_batch=SLOTS,
        precision=args.precision,
        backend="torch" if args.device else "onnxruntime",
        device=args.device,
    )
    options = SpeechOptions(lookahead_bias=args.bias, beam=args.beam)
    results: dict[str, object] = {
        "commit": report.commit(),
        "bias": args.bias,
        "beam": args.beam,
        "precision": args.precision,
        "device": args.device or "onnxruntime on cpu",
    }
    for path in args.sets:
        pool = load_pool(path)
        begun = time.perf_counter()
        texts, words, lookahead = transcribe(engine, pool, options)
        seconds = time.perf_counter() - begun
        values = asdict(score(pool.records, texts))
        values |= {
            "lookahead_mean_ms": round(1000 * float(np.mean(lookahead)), 1),
            "audio_seconds": round(sum(record.seconds for record in pool.records), 1),
            "compute_seconds": round(seconds, 1),
            "word_times": word_times(pool, words),
        }
        results[path.name] = values
        text = json.dumps(results, indent=1)
        if args.out:
            args.out.write_text(text + "\n")
    if not args.out:
        print(text)


if __name__ == "__main__":
    main()
