"""What is said of a clip, which triples are held out, and the tokenizer (ours).

    prompts.py --out tokenizer.model

A triple is (object, motion, background). One in ten is never seen in training, though each of its parts is.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import sentencepiece
from scene import BACKGROUNDS, MOTIONS, OBJECTS

Triple = tuple[str, str, str]

VOCABULARY = 143
TOKENS = 32
"""Most tokens of a prompt."""

_VERBS = ("moves", "moving", "goes", "flies", "slides", "drifts")
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": tuple(f"{verb} {where}" for verb in _VERBS for where in ("left", "to the left")),
    "right": tuple(f"{verb} {where}" for verb in _VERBS for where in ("right", "to the right")),
    "up": tuple(f"{verb} {where}" for verb in _VERBS for where in ("up", "upwards")),
    "down": tuple(f"{verb} {where}" for verb in _VERBS for where in ("down", "downwards")),
    "clockwise": (
        *(f"{verb} clockwise" for verb in (*_VERBS, "circles", "circling", "turns")),
        "moves around the center clockwise",
        "goes round in circles, clockwise",
    ),
    "counterclockwise": (
        *(f"{verb} counterclockwise" for verb in (*_VERBS, "circles", "circling", "turns")),
        *(f"{verb} anticlockwise" for verb in ("moves", "circles")),
        "moves around the center counterclockwise",
        "goes round in circles, counterclockwise",
    ),
    "still": (
        "stays still",
        "standing still",
        "stands still",
        "does not move",
        "not moving",
        "stays where it is",
        "stops",
        "rests",
    ),
}
BACKGROUND_PHRASES = (
    "on a {} background",
    "against a {} background",
    "on {}",
    "in front of a {} background",
    "with a {} background",
    "in front of {}",
)


def triples() -> list[Triple]:
    """All of them, in a fixed order."""
    return list(product(OBJECTS, MOTIONS, BACKGROUNDS))


def held_out() -> frozenset[Triple]:
    """Those that training never sees: one in ten."""
    everything = triples()
    order = np.random.default_rng(2026).permutation(len(everything))
    return frozenset(everything[index] for index in order[: len(everything) // 10])


def article(name: str) -> str:
    """The name with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plain(triple: Triple) -> str:
    """The prompt as the documentation writes it."""
    name, motion, background = triple
    return f"{article(name)} {MOTION_PHRASES[motion][0]} {BACKGROUND_PHRASES[0].format(background)}"


def paraphrase(rng: np.random.Generator, triple: Triple) -> str:
    """One of the ways to say it."""
    name, motion, background = triple
    if rng.random() < 0.3:
        return plain(triple)
    what = (article(name), f"the {name}", name)[rng.integers(3)]
    how = MOTION_PHRASES[motion][rng.integers(len(MOTION_PHRASES[motion]))]
    where = BACKGROUND_PHRASES[rng.integers(len(BACKGROUND_PHRASES))].format(background)
    if rng.random() < 0.25:
        return f"{where}, {what} {how}"
    text = f"{what} {how} {where}"
    return text.capitalize() + "." if rng.random() < 0.2 else text


def _words() -> list[str]:
    """Words of objects, backgrounds and motions."""
    motions = ["left", "right", "up", "upwards", "down", "downwards", "still", "stops", "rests"]
    motions += ["clockwise", "counterclockwise", "anticlockwise"]
    return sorted({word for name in OBJECTS for word in name.split()} | set(BACKGROUNDS) | set(motions))


def train_tokenizer(out: Path) -> None:
    """Write a SentencePiece model of the prompts' words."""
    rng = np.random.default_rng(5)
    lines = [paraphrase(rng, triple) for triple in triples() for _ in range(4)]
    # Words that no prompt has are spelled: every letter is to have a piece.
    lines += [" ".join("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")] * 20
    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=VOCABULARY,
            model_type="unigram",
            # Every word that matters is one piece: what it means need not be put together from letters.
            user_defined_symbols=[f"\u2581{word}" for word in _words()],
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--out", type=Path, required=True)
    train_tokenizer(parse.parse_args().out)


if __name__ == "__main__":
    main()
