"""Sounds of words, for the auxiliary CTC head: a few dozen classes that all words share (ours, on espeak-ng).

    lexicon.py --pool POOL... --out FILE

Word pieces are learned as sounds of their own, and most of them are rare; phonemes are common to digits,
orders and prompts alike, so an encoder learns to hear from far less speech. The file has the words of the
pools' texts as espeak-ng's US English voice says them, without stress.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pool import load_pool

_STRESS = str.maketrans("", "", "ˈˌ")


def sounds(words: Iterable[str]) -> dict[str, list[str]]:
    """Phonemes (IPA) of every word. Raises RuntimeError if espeak-ng says a word in other than one line."""
    ordered = sorted(set(words))
    said = subprocess.run(
        ["espeak-ng", "-q", "-v", "en-us", "--ipa", "--sep=_"],
        input="".join(f"{word}\n\n" for word in ordered), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if len(lines) != len(ordered):
        raise RuntimeError(f"espeak-ng said {len(lines)} lines for {len(ordered)} words")
    return {
        word: [sound for sound in line.translate(_STRESS).replace(" ", "_").split("_") if sound]
        for word, line in zip(ordered, lines, strict=True)
    }


class Lexicon:
    """Unit ids of words; 0 is CTC's blank."""

    def __init__(self, path: Path) -> None:
        stored = json.loads(path.read_text(encoding="utf-8"))
        number = {unit: index for index, unit in enumerate(stored["units"], 1)}
        self.size = len(number) + 1
        self._words = {word: [number[unit] for unit in units] for word, units in stored["words"].items()}

    def __call__(self, word: str) -> list[int]:
        """Ids of a word's phonemes; none for a word that no training text has."""
        return self._words.get(word, [])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    said = sounds(
        word for path in args.pool for record in load_pool(path).records for word in record.text.split()
    )
    units = sorted({unit for word in said.values() for unit in word})
    text = json.dumps({"units": units, "words": said}, ensure_ascii=False, indent=0)
    args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
