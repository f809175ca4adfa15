import gzip
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

Recipe = Callable[[str], Any]
COLUMNS = "path\tspeaker\ttext\tsplit\tseconds\tsample_rate"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Tables laid out like the shared data: 2 speakers x 10 takes, 60 orders, 60 wake phrases, 2 more."""
    tables: dict[str, list[str]] = {
        "fsdd": [COLUMNS],
        "wakeword": [COLUMNS],
        "librispeech-test-other": [COLUMNS],
    }
    for speaker in ("ann", "bob"):
        for take in range(10):
            split = "test" if take < 5 else "train"
            tables["fsdd"].append(f"fsdd/{speaker}/7_{take}.flac\t{speaker}\tseven\t{split}\t0.4\t8000")
    for number in range(60):
        split = "test" if number % 6 == 0 else "train"
        tables["wakeword"].append(f"wakeword/alexa/{number:03}.flac\t\talexa\t{split}\t1.5\t16000")
    tables["librispeech-test-other"] += [
        f"librispeech-test-other/1-{n}.flac\t1\thello\ttest\t2.0\t16000" for n in "01"
    ]
    tables["coffee"] = [f"{COLUMNS}\tslots\tsure"]
    for number in range(60):
        split = "test" if number % 6 == 0 else "train"
        slots = '"{""coffeeDrink"": ""mocha""}"'
        tables["coffee"].append(
            f"coffee/{number:03}.flac\t\tmake me a mocha\t{split}\t4.0\t16000\t{slots}\t1"
        )
    for name, lines in tables.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_splits_are_disjoint_and_keep_the_tables_test_part(recipe: Recipe, speech: Path) -> None:
    utterances = recipe("data").read_tables(speech)
    names = [u.name for u in utterances]
    assert len(names) == len(set(names)) == 142
    for u in utterances:
        take = int(u.name.rsplit("_", 1)[1]) if u.set == "fsdd" else -1
        number = int(u.name.rsplit("/", 1)[1]) if u.set in ("coffee", "wakeword") else -1
        was_test = u.set.startswith("libri") or (take < 5 if take >= 0 else number % 6 == 0)
        assert (u.split == "test") == was_test
        assert u.split in ("train", "dev", "test")
    for name in ("fsdd", "coffee", "wakeword"):
        assert {u.split for u in utterances if u.set == name} == {"train", "dev", "test"}
    coffee = next(u for u in utterances if u.set == "coffee")
    assert coffee.slots == {"coffeeDrink": "mocha"}
    assert coffee.sure


def test_a_held_out_speaker_is_in_no_other_split_but_test(recipe: Recipe, speech: Path) -> None:
    utterances = recipe("data").read_tables(speech, hold_out_speaker="bob")
    assert {u.split for u in utterances if u.speaker == "bob"} == {"held-out", "test"}
    assert {u.split for u in utterances if u.speaker == "ann"} == {"train", "dev", "test"}


def test_a_missing_table_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fsdd\.tsv"):
        recipe("data").read_tables(tmp_path)


def test_prompts_are_split_by_the_crc_of_their_name(recipe: Recipe, tmp_path: Path) -> None:
    names = [f"digits/word-{n}" for n in range(300)]
    listing = tmp_path / "list.txt.gz"
    lines = ["; Core sounds", "", "beep: [a beep]", "lost: Lost.", *[f"{name}: Hello." for name in names]]
    with gzip.open(listing, "wt", encoding="utf-8") as target:
        target.write("\n".join(lines) + "\n")
    (tmp_path / "digits").mkdir()
    for name in names:
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as clip:
            clip.setparams((1, 2, 8000, 0, "NONE", ""))
            clip.writeframes(bytes(8000))
    prompts, count = recipe("data").read_prompts(directory=tmp_path, listing=listing)
    assert (count.listed, count.dropped_text, count.missing, count.too_long) == (302, 1, 1, 0)
    assert {p.name for p in prompts if p.split == "test"} == {
        f"asterisk/{name}" for name in names if zlib.crc32(name.encode()) % 10 == 0
    }
    assert {p.split for p in prompts} == {"train", "dev", "test"}
    assert {p.seconds for p in prompts} == {0.5}
    # A clip that is too long to train on is still a test clip.
    kept, shorter = recipe("data").read_prompts(directory=tmp_path, listing=listing, longest=0.4)
    assert {p.split for p in kept} == {"test"}
    assert shorter.too_long == len(prompts) - len(kept)


def test_the_crc_rule_on_known_names(recipe: Recipe) -> None:
    data = recipe("data")
    assert data.crc("123456789") == 0xCBF43926  # the check value of CRC-32 (ITU-T V.42)
    assert data.crc("auth-incorrect") % 10 == 0
    assert data.crc("activated") % 10 != 0


def test_audio_comes_at_16_khz_whatever_its_rate(recipe: Recipe, clips: Path) -> None:
    data = recipe("data")
    for name in ("digit-three.flac", "coffee-mocha.flac"):
        info = soundfile.info(clips / name)
        samples = data.load_audio(clips / name)
        assert samples.dtype == np.float32
        assert len(samples) == pytest.approx(info.duration * 16000, abs=2)
        assert 0.01 < np.abs(samples).max() <= 1.01


def test_committed_clips_are_test_clips_as_listed(clips: Path) -> None:
    rows = [line.split("\t") for line in (clips / "clips.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert len(rows) == 8
    assert {row[0] for row in rows} == {path.name for path in clips.glob("*.flac")}
    notice = (clips / "NOTICE.md").read_text(encoding="utf-8")
    for file, _, _, _, seconds, rate, _ in rows:
        info = soundfile.info(clips / file)
        assert (info.samplerate, info.channels) == (int(rate), 1)
        assert info.duration == pytest.approx(float(seconds), abs=1e-3)
        assert file in notice
