"""Which emoji there are, which are held out, what is said of them, and the tokenizer (ours).

    names.py --out tokenizer.model --pictures pictures.npz

A name is held out in all styles: training never sees one of its pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

STYLES = {"flat": "fluent-emoji-flat", "noto": "noto"}
"""Name in prompts: npm package of @iconify-json."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "black": (16, 16, 20), "gray": (128, 128, 132), "blue": (70, 120, 225),
    "green": (60, 160, 90), "yellow": (248, 226, 120), "pink": (250, 175, 205), "purple": (110, 70, 170),
}  # fmt: skip
"""Name in prompts: RGB."""

TOKENS = 28
"""Of a prompt, padding included."""
LONGEST = 3
"""Words of a name."""
_UNWANTED = frozenset(
    """
    aquarius aries arrow arrows artist astronaut baby blood boy button cancer capricorn circle claus
    cook copyright curly dark detective divide dotted double elf fairy farmer finger fingers firefighter
    fist flag gemini genie girl globe guard hand hands health heavy hidden index infinity information
    input japanese judge keycap leo letter letters libra light mage mailbox man mans mark mechanic
    medium men mens merpeople minus multiply mx no oclock office older om ophiuchus palm palms people
    person pilot pisces plus pointing police prince princess registered sagittarius santa scientist
    scorpio sign singer speaker square student symbol taurus teacher technologist thirty thumb thumbs
    tone trade type virgo wavy woman womans women womens worker zzz
    """.split()  # noqa: SIM905  # a list of so many strings is hard to read
)


def wanted(icon: str) -> bool:
    """Whether an icon shows a thing that its name says."""
    words = icon.split("-")
    return len(words) <= LONGEST and not _UNWANTED & set(words) and all(word.isalpha() for word in words)


def spoken(icon: str) -> str:
    """The name as prompts have it."""
    return icon.replace("-", " ")


def held_out(icons: Sequence[str]) -> frozenset[str]:
    """One in ten."""
    order = np.random.default_rng(2026).permutation(len(icons))
    return frozenset(icons[index] for index in order[: len(icons) // 10])


def plain(icon: str, background: str, style: str) -> str:
    """The prompt as the documentation writes it."""
    name = spoken(icon)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} on a {background} background, {style} style"


def paraphrase(rng: np.random.Generator, icon: str, background: str, style: str, nameless: float) -> str:
    """One of the ways to say it; a share of them tells no name, so that a name is not needed."""
    if rng.random() < nameless:
        icon = "emoji"
    if rng.random() < 0.5:
        return plain(icon, background, style)
    name = spoken(icon)
    where = ("on {}", "on a {} background", "in front of {}", "with a {} background")[rng.integers(4)]
    how = (f", {style}", f", {style} style", f" in {style} style")[rng.integers(3)]
    return f"{(name, f'the {name}')[rng.integers(2)]} {where.format(background)}{how}"


def train_tokenizer(icons: Sequence[str], out: Path) -> None:
    """Write a SentencePiece model in which each word of a training name is one piece."""
    rng = np.random.default_rng(5)
    unseen = held_out(icons)
    seen = [icon for icon in icons if icon not in unseen]
    words = sorted({word for icon in seen for word in icon.split("-")} | set(BACKGROUNDS) | set(STYLES))
    lines = [
        paraphrase(rng, icon, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(list(STYLES))), 0.1)
        for icon in seen
        for _ in range(2)
    ]
    # Words that no prompt has are spelled: every letter is to have a piece.
    lines += [" ".join("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")] * 20
    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=len(words) + 90,
            model_type="unigram",
            # Every word that matters is one piece: what it means need not be put together from letters.
            user_defined_symbols=[f"\u2581{word}" for word in words],
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
    parse.add_argument("--pictures", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    args = parse.parse_args()
    with np.load(args.pictures) as stored:
        train_tokenizer([str(name) for name in stored["names"]], args.out)


if __name__ == "__main__":
    main()
