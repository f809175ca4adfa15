"""Streams of commands, utterances with pauses between them, to learn from and to be scored on (ours).

    join.py --speech SPEECH --split train --count 900 --out DATA/joined
    join.py --speech SPEECH --split dev  --count 40 --least 5 --most 5 --audio --out DATA/eval/streams_dev
    join.py --speech SPEECH --split test --count 60 --least 5 --most 5 --audio --out DATA/eval/streams_test

A model that has met one utterance a recording learns that after its last word nothing comes, and in a stream
it then hears only the first command. Encoder and predictor go on over an endpoint in serving, and so they do
here: the text of a stream is one text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from augment import RATE, Wave, add_noise, colour_noise, speech_level
from data import Utterance, load_audio, read_prompts, read_tables
from pool import PoolWriter, Record
from prepare import digit_strings
from render import as_samples, as_wave, clip_of, features_of

SHARES = {"coffee": 0.5, "strings": 0.2, "wakeword": 0.2, "asterisk": 0.1}
PAUSE = (0.4, 3.0)  # seconds


def parts_of(utterances: Sequence[Utterance], count: int, seed: int) -> dict[str, list[tuple[str, Wave]]]:
    """Texts and waves of what streams are made of; no more than `count` of each set."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[str, Wave]]] = {}
    for name in SHARES:
        if name == "strings":
            takes = [u for u in utterances if u.set == "fsdd"]
            made = digit_strings(takes, count, seed, repeats=0.1)
            found[name] = [(record.text, wave) for record, wave in made]
            continue
        members = [u for u in utterances if u.set == name]
        chosen = [members[i] for i in rng.permutation(len(members))[:count]]
        found[name] = []
        for u in chosen:
            clip = clip_of(load_audio(u.path), u.text, u.set, u.speaker, "real")
            start, end = clip.bounds
            found[name].append((u.text, clip.wave()[max(0, start - RATE // 8) : end + RATE // 8]))
    return found


def stream(parts: dict[str, list[tuple[str, Wave]]], size: int, rng: np.random.Generator) -> tuple[str, Wave]:
    """One stream of `size` utterances: its text and its audio.

    Levels differ by up to 5 dB from the first one's. Pauses are digital silence in four of ten streams, and
    the hush of a room in the others.
    """
    names = rng.choice(list(SHARES), size=size, p=list(SHARES.values()))
    texts: list[str] = []
    pieces: list[Wave] = [np.zeros(int(rng.uniform(0, 0.6) * RATE), np.float32)]
    level = 0.0
    for name in names:
        text, wave = parts[name][int(rng.integers(len(parts[name])))]
        texts.append(text)
        level = level or speech_level(wave)
        pieces.append(wave * np.float32(level / speech_level(wave) * 10 ** (rng.uniform(-5, 5) / 20)))
        pieces.append(np.zeros(int(rng.uniform(*PAUSE) * RATE), np.float32))
    whole = np.concatenate(pieces)
    if rng.random() < 0.6:
        hush = colour_noise("pink" if rng.random() < 0.5 else "brown", len(whole), rng)
        whole = add_noise(whole, hush, float(rng.uniform(30, 60)))
    return " ".join(texts), whole / np.float32(max(1.0, float(np.abs(whole).max())))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True, help="folder with the speech tables")
    parser.add_argument("--split", required=True, choices=["train", "dev", "test"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--count", type=int, required=True, help="streams to make")
    parser.add_argument("--least", type=int, default=2, help="fewest utterances of one")
    parser.add_argument("--most", type=int, default=4, help="most utterances of one")
    parser.add_argument("--audio", action="store_true", help="keep the audio: for scoring")
    args = parser.parse_args()
    seed = {"train": 29, "dev": 31, "test": 37}[args.split]
    prompts = read_prompts(wide=args.split == "train")[0]
    utterances = [u for u in [*read_tables(args.speech), *prompts] if u.split == args.split]
    parts = parts_of(utterances, 4 * args.count, seed)
    rng = np.random.default_rng(seed)
    with PoolWriter(args.out, audio=args.audio) as writer:
        for number in range(args.count):
            text, wave = stream(parts, int(rng.integers(args.least, args.most + 1)), rng)
            # What is stored and what is heard are the same 16-bit samples.
            heard = as_wave(as_samples(wave))
            record = Record(
                name=f"streams/{args.split}/{number:03d}",
                offset=0,
                frames=0,
                text=text,
                set="streams",
                split=args.split,
                speaker="many",
                kind="real",
                seconds=len(heard) / RATE,
            )
            writer.add(record, features_of(heard), heard if args.audio else None)


if __name__ == "__main__":
    main()
