"""The recordings: which exist, what they say, and who may learn from them (ours).

Every clip of the tables in shared/data/speech keeps the split that its table names. Debian's telephone
prompts follow the issue's rule: a prompt is test if the CRC-32 of its name is divisible by 10. *Name* is the
key of the transcript list core-sounds-en.txt, UTF-8, without extension, with its folder where it has one:
"activated", "digits/7". A development part (for choosing anything) is carved out of train by the same kind of
rule, so that it never moves when clips are added; test is for reported scores only.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from pool import Pool, load_pool
from text import correct_order, normalise, prompt_text

__all__ = [
    "RATE",
    "Pool",
    "PromptCount",
    "Utterance",
    "load_audio",
    "load_pool",
    "read_prompts",
    "read_tables",
]

RATE = 16000  # samples per second of everything the recipe handles
SETS = ("fsdd", "coffee", "wakeword", "librispeech-test-other")
DEV_TAKES = frozenset({5, 6})  # FSDD takes kept for choosing; 0-4 are test
PROMPT_DIR = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
PROMPT_LIST = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and what it says: `set` is the source, `split` train, dev or test."""

    name: str
    path: Path
    text: str
    set: str
    split: str
    speaker: str
    seconds: float
    slots: dict[str, str] = field(default_factory=dict)
    sure: bool = True


@dataclass(frozen=True, slots=True)
class PromptCount:
    """How many prompts are listed, and how many were left out because of text, missing file or length."""

    listed: int
    dropped_text: int
    missing: int
    too_long: int


def crc(name: str) -> int:
    """CRC-32 of a name's UTF-8 bytes, the hash of every split rule here."""
    return zlib.crc32(name.encode())


def read_tables(speech: Path, hold_out_speaker: str | None = None) -> list[Utterance]:
    """All clips of `speech`/*.tsv with train divided into train and dev.

    `hold_out_speaker` moves one FSDD speaker's train and dev takes to the split "held-out", to measure what
    an unseen speaker costs. Raises FileNotFoundError if a table is missing, KeyError if it lacks a column.
    """
    found: list[Utterance] = []
    for name in SETS:
        with (speech / f"{name}.tsv").open(newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table, delimiter="\t"):
                split = row["split"]
                if split == "train" and _is_dev(name, row["path"]):
                    split = "dev"
                text = normalise(row["text"])
                if split == "train" and name == "coffee":
                    text = correct_order(text)
                if hold_out_speaker and row["speaker"] == hold_out_speaker and split != "test":
                    split = "held-out"
                found.append(
                    Utterance(
                        name=row["path"].removesuffix(".flac"),
                        path=speech / row["path"],
                        text=text,
                        set=name,
                        split=split,
                        speaker=row["speaker"] or name,
                        seconds=float(row["seconds"]),
                        slots=json.loads(row["slots"]) if row.get("slots") else {},
                        sure=row.get("sure", "1") == "1",
                    )
                )
    return found


def _is_dev(set_name: str, path: str) -> bool:
    if set_name == "fsdd":
        return int(Path(path).stem.rsplit("_", 1)[1]) in DEV_TAKES
    return crc(path) % 20 == 0


def read_prompts(
    wide: bool = False, directory: Path = PROMPT_DIR, listing: Path = PROMPT_LIST, longest: float = 20.0
) -> tuple[list[Utterance], PromptCount]:
    """Debian's telephone prompts: 8 kHz WAV (asterisk-core-sounds-en-wav) or, `wide`, 16 kHz G.722.

    Train prompts of more than `longest` seconds are left out: they would weigh a batch down. Test: CRC-32 of
    the name divisible by 10, whatever its length; dev: CRC-32 leaves 1 when divided by 20.
    """
    suffix = ".g722" if wide else ".wav"
    found: list[Utterance] = []
    listed = dropped = missing = too_long = 0
    with gzip.open(listing, "rt", encoding="utf-8") as lines:
        for line in lines:
            match = re.match(r"([\w/-]+):\s*(.*\S)", line)
            if not match:
                continue
            listed += 1
            name, written = match.groups()
            text = prompt_text(name, written)
            path = directory / f"{name}{suffix}"
            if text is None:
                dropped += 1
                continue
            if not path.is_file():
                missing += 1
                continue
            # G.722 at 64 kbit/s: 8,000 bytes per second.
            seconds = path.stat().st_size / 8000 if wide else soundfile.info(path).duration
            value = crc(name)
            split = "test" if value % 10 == 0 else "dev" if value % 20 == 1 else "train"
            if seconds > longest and split != "test":
                too_long += 1
                continue
            found.append(
                Utterance(
                    name=f"asterisk/{name}",
                    path=path,
                    text=text,
                    set="asterisk",
                    split=split,
                    speaker="allison",
                    seconds=seconds,
                )
            )
    return found, PromptCount(listed, dropped, missing, too_long)


def load_audio(path: Path, rate: int = RATE) -> npt.NDArray[np.float32]:
    """Mono samples in [-1, 1] at `rate`. G.722 is decoded by the ffmpeg program, all else by libsndfile."""
    if path.suffix == ".g722":
        raw = subprocess.run(
            [
                "ffmpeg",
                "-v",
                "error",
                "-f",
                "g722",
                "-i",
                str(path),
                "-f",
                "s16le",
                "-ac",
                "1",
                "-ar",
                str(rate),
                "-",
            ],
            check=True,
            capture_output=True,
        ).stdout
        return np.asarray(np.frombuffer(raw, np.int16) / 32768, np.float32)
    samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = np.asarray(samples.mean(axis=1), np.float32)
    if own_rate != rate:
        mono = np.asarray(soxr.resample(mono, own_rate, rate), np.float32)
    return mono
