"""Build the feature pools that `ancat-commands-en` is trained and scored on.

    python models/ancat-commands-en/recipe/prepare.py --speech shared/data/speech --out DATA --name
    pool1

writes OUT/NAME (training pool with cmvn.npy), OUT/eval/<set> (development and test sets with audio, and their
harder variants) and OUT/tokenizer.model. Formats: pool.py. All seeds are fixed: the same inputs give the same
pool.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from augment import RATE, Strength, Wave
from data import Utterance, load_audio, read_prompts, read_tables
from pool import PoolWriter, Record, hours, load_pool
from render import Clip, Item, as_samples, as_wave, clip_of, features_of, harder, join_words, render
from text import DIGITS
from vocabulary import train_tokenizer

log = logging.getLogger("prepare")

# Shares of the training pool's hours; the synthetic part is what `--synthetic` supplies within each set.
SHARES = {"coffee": 0.35, "digits": 0.06, "strings": 0.19, "wakeword": 0.15, "asterisk": 0.15, "mix": 0.10}
SYNTHETIC_SHARE = {
    "coffee": 0.35,
    "digits": 0.4,
    "strings": 0.3,
    "wakeword": 0.35,
    "asterisk": 0.15,
    "mix": 0.25,
}
SEED = 20230504
STRINGS = 300
STRING_SEEDS = {"dev": 7, "test": 11, "held-out": 13}
TESTS = {"digits": "fsdd", "coffee": "coffee", "wakeword": "wakeword"}
"""Names of the test sets that are single recordings of one table."""
_STATE: dict[str, object] = {}


class Deck:
    """Endless draws from some clip numbers in shuffled rounds: every clip comes as often as every other."""

    def __init__(self, numbers: Sequence[int], rng: np.random.Generator) -> None:
        self._numbers = list(numbers)
        self._rng = rng
        self._left: list[int] = []

    def draw(self) -> int:
        """Next clip number."""
        if not self._left:
            self._left = [self._numbers[i] for i in self._rng.permutation(len(self._numbers))]
        return self._left.pop()

    def __bool__(self) -> bool:
        return bool(self._numbers)


class Planner:
    """Decides what the training pool is made of before any audio is touched."""

    def __init__(self, clips: Sequence[Clip], seed: int) -> None:
        self._clips = clips
        self._rng = np.random.default_rng(seed)
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        takes: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, clip in enumerate(clips):
            group = {"fsdd": "digits"}.get(clip.set, clip.set)
            groups[group, clip.kind].append(number)
            if clip.text in DIGITS:
                takes[clip.kind, clip.speaker][clip.text].append(number)
        self._decks = {key: Deck(numbers, self._rng) for key, numbers in groups.items()}
        # Strings need a speaker who has said every digit.
        self._takes: dict[str, list[dict[str, Deck]]] = defaultdict(list)
        for (kind, _), by_digit in sorted(takes.items()):
            if len(by_digit) == len(DIGITS):
                self._takes[kind].append({d: Deck(n, self._rng) for d, n in by_digit.items()})

    def _string(self, kind: str) -> tuple[int, ...]:
        speaker = self._takes[kind][int(self._rng.integers(len(self._takes[kind])))]
        count = int(self._rng.integers(1, 11))
        return tuple(speaker[DIGITS[int(d)]].draw() for d in self._rng.integers(10, size=count))

    def _segments(self, group: str, kind: str) -> tuple[tuple[int, ...], ...]:
        if group == "mix":
            parts = self._rng.choice(
                ["coffee", "strings", "wakeword", "asterisk"], size=2, p=[0.3, 0.3, 0.3, 0.1]
            )
            return tuple(self._segments(str(part), kind)[0] for part in parts)
        if group == "strings":
            # A synthetic voice reads whole strings as well as single digits that are put together.
            if kind == "synthetic" and self._decks.get(("strings", kind)) and self._rng.random() < 0.6:
                return ((self._decks["strings", kind].draw(),),)
            return (self._string(kind),)
        return ((self._decks[group, kind].draw(),),)

    def plan(self, total_hours: float, synthetic: bool) -> list[Item]:
        """Items for about `total_hours`, shuffled, shares as in SHARES and SYNTHETIC_SHARE."""
        items: list[Item] = []
        for group, share in SHARES.items():
            part = SYNTHETIC_SHARE[group] if synthetic else 0.0
            for kind, weight in (("real", 1 - part), ("synthetic", part)):
                left = total_hours * 3600 * share * weight
                while left > 0:
                    segments = self._segments(group, kind)
                    speech = sum(self._clips[i].speech_seconds + 0.1 for s in segments for i in s)
                    left -= speech + 0.35 * len(segments) + 0.55
                    items.append(Item(group, segments, int(self._rng.integers(2**62))))
        return [items[i] for i in self._rng.permutation(len(items))]


def _work(item: Item) -> tuple[Item, np.ndarray, str, tuple[tuple[str, float, float], ...], float]:
    clips, noises, strength = _STATE["clips"], _STATE["noises"], _STATE["strength"]
    made = render(item, clips, noises, strength)  # type: ignore[arg-type]
    return item, features_of(made.wave), made.text, made.words, len(made.wave) / RATE


def build_pool(
    folder: Path, items: Sequence[Item], clips: Sequence[Clip], noises: Sequence[Wave], jobs: int
) -> None:
    """Render `items` with `jobs` processes and write them, in order, to `folder`."""
    _STATE.update(clips=clips, noises=noises, strength=Strength())
    started = time.monotonic()
    with PoolWriter(folder) as writer, multiprocessing.get_context("fork").Pool(jobs) as workers:
        for done, (item, features, text, words, seconds) in enumerate(
            workers.imap(_work, items, chunksize=16), 1
        ):
            parts = [clips[i] for segment in item.segments for i in segment]
            kind = "synthetic" if any(part.kind == "synthetic" for part in parts) else "real"
            writer.add(
                Record(
                    name=f"{item.set}/{done - 1:06d}",
                    offset=0,
                    frames=0,
                    text=text,
                    set=item.set,
                    split="train",
                    speaker=parts[0].speaker,
                    kind=kind,
                    seconds=seconds,
                    words=words,
                ),
                features,
            )
            if done % 2000 == 0:
                log.info("%d of %d utterances, %.0f s", done, len(items), time.monotonic() - started)


def digit_strings(
    takes: Sequence[Utterance], count: int, seed: int, repeats: float = 0.0
) -> list[tuple[Record, Wave]]:
    """Strings of 3 to 8 digits from single takes of one speaker: 50-250 ms pauses, 200 ms around.

    A digit is the one before it again with a chance of `repeats`, beyond the one in ten that is due.
    """
    rng = np.random.default_rng(seed)
    by_speaker: dict[str, dict[str, list[Utterance]]] = defaultdict(lambda: defaultdict(list))
    for take in takes:
        by_speaker[take.speaker][take.text].append(take)
    names = sorted(by_speaker)
    made = []
    for number in range(count):
        speaker = names[number % len(names)]
        digits = [DIGITS[int(d)] for d in rng.integers(10, size=int(rng.integers(3, 9)))]
        for place in range(1, len(digits) if repeats else 0):
            if rng.random() < repeats:
                digits[place] = digits[place - 1]
        chosen = [by_speaker[speaker][d][int(rng.integers(len(by_speaker[speaker][d])))] for d in digits]
        clips = [clip_of(load_audio(take.path), take.text, "fsdd", speaker, "real") for take in chosen]
        waves = [clip.wave() for clip in clips]
        wave, spans = join_words(waves, [int(rng.uniform(0.05, 0.25) * RATE) for _ in waves[1:]])
        lead = int(0.2 * RATE)
        silence = np.zeros(lead, np.float32)
        words = tuple(
            (clip.text, (lead + start + clip.bounds[0]) / RATE, (lead + start + clip.bounds[1]) / RATE)
            for clip, (start, _) in zip(clips, spans, strict=True)
        )
        whole = np.concatenate([silence, wave, silence])
        record = _record(
            f"strings/{takes[0].split}/{number:03d}", " ".join(digits), "strings", takes[0].split, speaker
        )
        made.append((_with(record, seconds=len(whole) / RATE, words=words), whole))
    return made


def _record(name: str, text: str, set_name: str, split: str, speaker: str) -> Record:
    return Record(name, 0, 0, text, set_name, split, speaker, "real", 0.0)


def _with(record: Record, **changes: object) -> Record:
    values = {name: getattr(record, name) for name in Record.__slots__} | changes
    return Record(**values)


def single(utterances: Iterable[Utterance]) -> list[tuple[Record, Wave]]:
    """Each clip as it is."""
    made = []
    for u in utterances:
        wave = load_audio(u.path)
        record = _record(u.name, u.text, u.set, u.split, u.speaker)
        made.append((_with(record, seconds=len(wave) / RATE, slots=u.slots, sure=u.sure), wave))
    return made


def write_eval(folder: Path, examples: Sequence[tuple[Record, Wave]], noises: Sequence[Wave]) -> None:
    """Write one evaluation set with audio, and its variants beside it as <name>_noise10 and <name>_phone."""
    variants: dict[str, Callable[[Wave, int], Wave]] = {
        "": lambda wave, index: wave,
        "_noise10": lambda wave, index: harder(wave, "noise10", index, noises),
        "_phone": lambda wave, index: harder(wave, "phone", index, noises),
    }
    for suffix, change in variants.items():
        changed = [(record, change(wave, index)) for index, (record, wave) in enumerate(examples)]
        write_set(folder.with_name(folder.name + suffix), changed)


def write_set(folder: Path, examples: Iterable[tuple[Record, Wave]]) -> None:
    """Write one set with audio."""
    with PoolWriter(folder, audio=True) as writer:
        for record, wave in examples:
            # What is stored and what is scored are the same 16-bit samples.
            heard = as_wave(as_samples(wave))
            writer.add(record, features_of(heard), heard)


def build_evals(out: Path, utterances: Sequence[Utterance], noises: Sequence[Wave]) -> None:
    """Development and test sets of every source, digit strings included."""
    prompts, wide = read_prompts()[0], read_prompts(wide=True)[0]
    for split in ("dev", "test", "held-out"):
        chosen = {
            name: [u for u in utterances if u.set == name and u.split == split] for name in ("fsdd", "coffee")
        }
        chosen["wakeword"] = [u for u in utterances if u.set == "wakeword" and u.split == split]
        chosen["librispeech"] = [
            u for u in utterances if u.set == "librispeech-test-other" and u.split == split
        ]
        chosen["asterisk"] = [u for u in prompts if u.split == split]
        chosen["asterisk16k"] = [u for u in wide if u.split == split]
        for name, members in chosen.items():
            if members:
                write_eval(out / f"{ {'fsdd': 'digits'}.get(name, name) }_{split}", single(members), noises)
        if chosen["fsdd"]:
            strings = digit_strings(chosen["fsdd"], STRINGS, STRING_SEEDS[split])
            write_eval(out / f"strings_{split}", strings, noises)


def write_tests(out: Path, utterances: Sequence[Utterance]) -> None:
    """The test sets that need only the tables, without variants; the same as `build_evals` writes."""
    for name, set_name in TESTS.items():
        members = [u for u in utterances if u.set == set_name and u.split == "test"]
        write_set(out / f"{name}_test", single(members))
    digits = [u for u in utterances if u.set == "fsdd" and u.split == "test"]
    write_set(out / "strings_test", digit_strings(digits, STRINGS, STRING_SEEDS["test"]))


def train_clips(utterances: Sequence[Utterance], cache: Path) -> list[Clip]:
    """All real training clips in memory, prompts at both of their sample rates.

    Decoded audio is kept in `cache` (an npz file) for the next run, for as long as the list of clips is the
    same.
    """
    prompts = [p for wide in (False, True) for p in read_prompts(wide)[0]]
    chosen = [u for u in (*utterances, *prompts) if u.split == "train"]
    paths = [str(u.path) for u in chosen]
    if cache.exists():
        with np.load(cache) as stored:
            if stored["paths"].tolist() == paths:
                waves = np.split(stored["samples"], stored["ends"][:-1])
                return [
                    clip_of(as_wave(wave), u.text, u.set, u.speaker, "real")
                    for u, wave in zip(chosen, waves, strict=True)
                ]
    clips = [clip_of(load_audio(u.path), u.text, u.set, u.speaker, "real") for u in chosen]
    ends = np.cumsum([len(clip.samples) for clip in clips])
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        cache, paths=np.array(paths), ends=ends, samples=np.concatenate([clip.samples for clip in clips])
    )
    return clips


def report(folder: Path) -> dict[str, object]:
    """Hours and utterances by set and kind of a finished pool; also written to report.json beside it."""
    records = load_pool(folder).records
    rows: dict[str, object] = {"hours": round(hours(records), 3), "utterances": len(records)}
    for (set_name, kind), count in sorted(Counter((r.set, r.kind) for r in records).items()):
        part = [r for r in records if (r.set, r.kind) == (set_name, kind)]
        rows[f"{set_name} {kind}"] = {"hours": round(hours(part), 3), "utterances": count}
    synthetic = hours([r for r in records if r.kind == "synthetic"])
    rows["synthetic_share"] = round(synthetic / max(hours(records), 1e-9), 3)
    (folder / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True, help="folder with the speech tables")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--name", default="pool1", help="name of the training pool")
    parser.add_argument("--hours", type=float, default=16.0, help="hours of training audio")
    parser.add_argument("--synthetic", type=Path, help="pool of synthetic clips made by synthesize.py")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="seed of the training pool: others, other variants"
    )
    parser.add_argument("--hold-out-speaker", help="FSDD speaker to leave out of training, for a check only")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--skip-eval", action="store_true", help="leave the evaluation sets as they are")
    parser.add_argument(
        "--only-tests",
        action="store_true",
        help="write the plain test sets of digits, strings, orders and wake phrases, and nothing else; "
        "needs no prompts",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    utterances = read_tables(args.speech, args.hold_out_speaker)
    if args.only_tests:
        write_tests(args.out / "eval", utterances)
        return
    clips = train_clips(utterances, args.out / "clips.npz")
    # Babble is made of training clips that are longer than a word.
    noises = [clip.wave()[slice(*clip.bounds)] for clip in clips if clip.speech_seconds > 1.0][::3]
    log.info("%d real training clips, prompts: %s", len(clips), read_prompts()[1])
    if args.synthetic:
        made = load_pool(args.synthetic)
        clips += [clip_of(made.samples(r), r.text, r.set, r.speaker, "synthetic") for r in made.records]
    train_tokenizer(utterances, args.out / "tokenizer.model")
    if not args.skip_eval:
        build_evals(args.out / "eval", utterances, noises)
    items = Planner(clips, args.seed).plan(args.hours, synthetic=args.synthetic is not None)
    build_pool(args.out / args.name, items, clips, noises, args.jobs)
    log.info("%s", json.dumps(report(args.out / args.name), indent=1))


if __name__ == "__main__":
    main()
