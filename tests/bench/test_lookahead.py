"""The sweep's arithmetic, and the whole command on a few recordings with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realtide.bench import audio
from realtide.bench.encoder import EncoderBench, node_cost, windows_of
from realtide.bench.points import Point
from realtide.bench.pools import Pool, Utterance, batches, load_pool
from realtide.bench.recognize import Recognized, load_model, recognize
from realtide.bench.sweep import Clock, Tally, align, compare, interval, table
from realtide.cli.errors import CommandError, UsageError
from realtide.engines.ancat import latency
from realtide.engines.ancat.engine import load
from realtide.engines.ancat.types import Audio, EndpointRules, Final, Finish, SpeechOptions
from tests.bench.conftest import AUDIO, TEXTS, Tiny
from tests.cli.conftest import Run

CLOCK = Clock(frame=0.04, overhang=0.015, node=0.001)


def test_word_errors_and_right_words_of_pairs() -> None:
    found = align([("one two three", "one too three"), ("", "oh"), ("a b", ""), ("a b", "a x b")])
    assert [errors for errors, _ in found] == [1, 1, 2, 1]
    assert [right for _, right in found] == [[(0, 0), (2, 2)], [], [], [(0, 0), (1, 2)]]
    assert align([("", "")]) == [(0, [])]


def test_the_interval_holds_the_rate_and_is_a_point_without_variance() -> None:
    low, high = interval([0, 1] * 50, [10, 10] * 50)
    assert low < 0.05 < high
    assert interval([1, 1], [4, 4]) == (0.25, 0.25)


def test_a_tally_takes_latency_and_emission_from_what_was_recognized() -> None:
    pool = Pool(
        "p",
        np.zeros((16, 80), np.float16),
        (Utterance(0, 16, "one two", (("one", 0.0, 0.05), ("two", 0.06, 0.1))),),
    )
    depths = np.array([[0, 1, 0, 0], [1, 0, 0, 0]], np.int16)
    available = latency.availability(depths.astype(np.int64))[-1]
    tally = Tally(CLOCK, layers=2)
    tally.add(pool, [Recognized(0, (("one", 0), ("tow", 3)), depths, available)])
    figures = tally.figures()
    assert (figures["errors"], figures["words"], figures["wer_percent"]) == (1, 2, 50.0)
    assert figures["pools"] == {"p": 50.0}
    # Row 0 waits for node (1, 1), which waits for input frame 2; row 1 needs it too.
    assert available.tolist() == [2, 2, 2, 3]
    assert figures["algorithmic_latency"]["mean_ms"] == pytest.approx((2 + 1) / 4 * 40)
    # "one" is right: its row needs frame 2, there after 3 frames and the overhang; the word ended at 0.05 s.
    assert figures["emission_delay"]["count"] == 1
    assert figures["emission_delay"]["mean_ms"] == pytest.approx((0.12 + 0.015 - 0.05) * 1000)
    simulated = latency.simulate(depths.astype(np.int64), 0.001, 0.04).upl.mean() * 1000
    assert figures["user_perceived_latency"]["mean_ms"] == pytest.approx(simulated, abs=0.01)
    assert figures["user_perceived_latency_loaded"]["mean_ms"] > figures["user_perceived_latency"]["mean_ms"]


def point(family: str, milliseconds: float, rate: float, bias: float = 0.0) -> dict[str, Any]:
    figures = {"mean_ms": milliseconds, "p50_ms": 0.0, "p90_ms": 2 * milliseconds, "p99_ms": 0.0}
    return {
        "label": family, "family": family, "rule": "adaptive" if family == "a" else "chunked", "bias": bias,
        "wer_percent": rate, "wer_interval_percent": [rate, rate], "algorithmic_latency": figures,
        "user_perceived_latency": figures, "user_perceived_latency_loaded": figures, "emission_delay": None,
    }  # fmt: skip


def test_curves_are_compared_at_equal_latency_within_their_range() -> None:
    points = [
        point("a", 0, 9.0), point("a", 100, 5.0), point("a", 400, 4.0),
        point("c", 50, 8.0), point("c", 150, 6.0), point("single", 100, 1.0),
    ]  # fmt: skip
    found = compare(points, "a")
    assert found == [{"latency": "mean_ms", "at_ms": 100.0, "a": 5.0, "c": 7.0, "below": True}]
    assert compare(points, "a", "p90_ms")[0]["at_ms"] == 200.0


def test_the_table_names_biases_of_adaptive_points_only() -> None:
    text = table([point("a", 100, 5.0, bias=-3.0), point("c", 50, 8.0)])
    assert "| a | -3 | 5.00 |" in text
    assert "| c |  | 8.00 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_points_are_read_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    path = str(tmp_path / "x.pt")
    assert Point.parse(f"ancat:{path}:bias=-3,0,1.5") == Point("ancat", Path(path), (-3.0, 0.0, 1.5))
    assert Point.parse(f"chunked-8:{path}") == Point("chunked-8", Path(path), (0.0,))
    assert Point.parse(f"chunked-8:{path}").family == Point.parse(f"chunked-16:{path}").family == "chunked"
    for wrong in ("ancat", f"a:{path}:bias=", f"a:{path}:bias=x", f"a:{path}:bias=1,1", "a:/nowhere"):
        with pytest.raises(UsageError, match="--point"):
            Point.parse(wrong)


def test_a_pool_leaves_out_what_is_not_sure_and_batches_hold_each_utterance_once(pool: Path) -> None:
    found = load_pool(pool)
    assert [one.text for one in found.utterances] == list(TEXTS.values())
    assert found.utterances[0].words == (("three", 0.05, 0.45),)
    mean, std = np.full(80, 2.0, np.float32), np.full(80, 4.0, np.float32)
    made = list(batches(found, mean, std, 4, budget=60))
    assert sorted(index for batch in made for index in batch.picked) == [0, 1, 2, 3]
    for batch in made:
        assert batch.features.shape[1] == 4 * batch.frames.max()
        for row, index in enumerate(batch.picked):
            one, rows = found.utterances[index], 4 * int(batch.frames[row])
            raw = np.asarray(found.features[one.offset : one.offset + rows], np.float32)
            np.testing.assert_allclose(batch.features[row, :rows], (raw - 2) / 4, rtol=1e-6)
            assert not batch.features[row, rows:].any()
    with pytest.raises(CommandError, match="not a pool"):
        load_pool(pool.parent)


def test_recognition_does_not_depend_on_the_batch(tiny: Tiny, pool: Path) -> None:
    model = load_model(tiny.path, None, None)
    whole = load_pool(pool)
    together = recognize(model, whole, 0.0)
    assert [one.index for one in together] == [0, 1, 2, 3]
    for index, utterance in enumerate(whole.utterances):
        alone = recognize(model, Pool("p", whole.features, (utterance,)), 0.0)[0]
        assert alone.words == together[index].words
        np.testing.assert_array_equal(alone.depths, together[index].depths)
        np.testing.assert_array_equal(alone.available, together[index].available)


@pytest.mark.parametrize("bias", [-2.0, 1.0])
def test_recognition_is_what_the_serving_engine_gives(tiny: Tiny, pool: Path, bias: float) -> None:
    """Same words, and the same lookahead of each word's last token."""
    import soundfile

    found = recognize(load_model(tiny.path, None, None), load_pool(pool), bias)
    engine = load(tiny.path, slots=1, max_batch=1)
    rules = EndpointRules(enabled=False, max_utterance_ms=20_000)
    for name, expected in zip(TEXTS, found, strict=True):
        samples, rate = soundfile.read(AUDIO / f"{name}.flac", dtype="float32")
        session = engine.open(SpeechOptions(sample_rate=rate, lookahead_bias=bias, endpointing=rules))
        session.push(Audio(samples, 0.0))
        session.push(Finish())
        finals = []
        while session.runnable():
            for events in engine.step([session], lambda stage, seconds, batch: None):
                finals += [event for event in events if isinstance(event, Final)]
        session.close()
        words = [word for final in finals for word in final.words]
        assert [word.text for word in words] == [text for text, _ in expected.words]
        waited = [(int(expected.available[row]) - row) * 0.04 for _, row in expected.words]
        assert [word.lookahead for word in words] == pytest.approx(waited)


def test_a_checkpoint_and_its_bundle_are_the_same_model(tiny: Tiny, pool: Path) -> None:
    bundle = load_model(tiny.path, None, None)
    checkpoint = load_model(tiny.checkpoint, tiny.cmvn, tiny.tokenizer)
    found = load_pool(pool)
    for one, other in zip(recognize(bundle, found, 0.0), recognize(checkpoint, found, 0.0), strict=True):
        assert one.words == other.words
        np.testing.assert_array_equal(one.depths, other.depths)
    with pytest.raises(CommandError, match="--cmvn"):
        load_model(tiny.checkpoint, None, None)


def test_the_timed_encoder_waits_as_the_offline_one_does(tiny: Tiny) -> None:
    from realtide.engines.ancat.offline import encode, hard_arcs

    bench = EncoderBench.of_bundle(tiny.path, 3)
    sound = audio.loop([AUDIO / "coffee-mocha.flac", AUDIO / "librispeech-begin.flac"], 16000)
    windows = windows_of(sound, 16000, tiny.path, 3, 40)
    assert windows.shape == (3, 40, 7, 80)
    with torch.inference_mode():
        arcs = encode(
            tiny.model.encoder, torch.from_numpy(windows), torch.full((3,), 40), hard_arcs(bench.config, 1.0)
        ).arcs
    offline = latency.algorithmic_latency(latency.clip_depths(latency.depths_from_arcs(arcs.numpy())))
    for frames in (1, 3):
        times = bench.play(windows, frames, bias=1.0)
        assert times.frames == 120
        assert len(times.steps) == -(-40 // frames)
        assert times.latency == pytest.approx(offline.mean())
    assert bench.play(windows, 1, cap=0).latency == 0
    with pytest.raises(ValueError, match="are needed"):
        windows_of(sound[:16000], 16000, tiny.path, 1, 40)


def test_a_nodes_cost_is_positive(tiny: Tiny) -> None:
    sound = audio.loop([AUDIO / "coffee-mocha.flac"], 16000)
    assert 0 < node_cost(tiny.path, sound, 16000, rounds=1) < 1


def test_the_command_writes_a_result_a_table_and_a_picture(
    tiny: Tiny, pool: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    done = run(
        "bench", "lookahead", "--point", f"ancat:{tiny.path}:bias=-3,3",
        "--point", f"other-1:{tiny.checkpoint}",
        "--pool", pool, "--cmvn", tiny.cmvn, "--tokenizer", tiny.tokenizer, "--out", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((out / "lookahead.json").read_text())
    assert [(one["label"], one["bias"]) for one in result["points"]] == [
        ("ancat", -3),
        ("ancat", 3),
        ("other-1", 0),
    ]
    waits = [one["algorithmic_latency"]["mean_ms"] for one in result["points"]]
    assert waits[0] < waits[2] < waits[1]
    assert result["node_cost_microseconds"] > 0
    assert (out / "lookahead.md").read_text().count("\n") == 5
    assert (out / "lookahead.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--point", "a:{path}", "--point", "a:{path}"), "one label"),
        (("--point", "a:{path}", "--reference", "b"), "--reference"),
        (("--point", "a:{checkpoint}", "--cmvn", "{cmvn}", "--tokenizer", "{tokenizer}"), "--node-bundle"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    tiny: Tiny, pool: Path, run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    named = {name: getattr(tiny, name) for name in ("path", "checkpoint", "cmvn", "tokenizer")}
    filled = [text.format(**named) for text in arguments]
    done = run("bench", "lookahead", *filled, "--pool", pool, "--out", tmp_path / "x")
    assert done.code == 2
    assert sentence in done.err
