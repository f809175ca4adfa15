from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from realtide.bench import audio, plan
from realtide.bench.plan import Plan
from realtide.cli.errors import CommandError

PLAN = Plan(
    streams=5, seconds=2.0, warmup=0.5, chunk_ms=40, probe_ms=200, rate=16000, audio=("a.wav", "b.wav")
)


def test_a_plan_survives_the_way_to_another_process() -> None:
    given = replace(PLAN, lookahead_bias=-1.5, address="x:1")
    assert Plan.from_json(given.to_json()) == given


def test_streams_have_phases_within_a_chunk_that_a_seed_decides() -> None:
    members = plan.streams(PLAN, 100)
    assert [member.index for member in members] == list(range(5))
    assert all(0 <= member.phase < 0.04 for member in members)
    assert len({member.phase for member in members}) == 5
    assert all(0 <= member.first < 100 and 0 <= member.probe < PLAN.probe_every for member in members)
    assert plan.streams(PLAN, 100) == members
    assert plan.streams(replace(PLAN, seed=2), 100) != members


def test_a_chunk_is_due_when_its_last_sample_has_been_spoken() -> None:
    member = plan.streams(PLAN, 100)[0]
    for k in (0, 1, 37):
        assert member.due(PLAN, k) == pytest.approx(member.spoken((k + 1) * PLAN.size / PLAN.rate))


def test_the_schedule_has_every_chunk_of_every_stream_in_order_of_time() -> None:
    members = plan.streams(PLAN, 100)
    found = list(plan.schedule(PLAN, members))
    assert len(found) == 5 * PLAN.count
    assert {(stream.index, k) for _, stream, k in found} == {
        (s, k) for s in range(5) for k in range(PLAN.count)
    }
    times = [due for due, _, _ in found]
    assert times == sorted(times)


def test_every_stream_sends_until_the_window_ends() -> None:
    for chunk_ms in (40, 70, 100, 330):
        given = replace(PLAN, chunk_ms=chunk_ms)
        last = min(member.due(given, given.count - 1) for member in plan.streams(given, 50))
        assert last >= given.warmup + given.seconds


def test_probes_follow_one_chunk_in_so_many() -> None:
    assert PLAN.probe_every == 5
    assert replace(PLAN, probe_ms=10).probe_every == 1


def test_recordings_follow_each_other_with_pauses(tmp_path: Path) -> None:
    tone = np.sin(np.arange(8000) / 5).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.wav", tone, 8000)
    soundfile.write(tmp_path / "b.wav", np.stack([tone, -tone], 1), 16000)
    found = audio.loop([tmp_path / "a.wav", tmp_path / "b.wav"], 16000, pause=0.25)
    assert len(found) == 16000 + 4000 + 8000 + 4000
    assert not found[16000:20000].any()
    np.testing.assert_allclose(found[20000:28000], tone, atol=1e-4)


def test_chunks_are_whole_and_the_last_is_filled_up() -> None:
    found = audio.chunks(np.ones(25, np.float32), 10)
    assert [len(piece) for piece in found] == [10, 10, 10]
    assert found[2].tolist() == [1.0] * 5 + [0.0] * 5


def test_linear16_is_little_endian_and_clipped() -> None:
    values = np.array([0.0, 0.5, 1.0, -1.0, -2.0], np.float32)
    assert np.frombuffer(audio.linear16(values), "<i2").tolist() == [0, 16384, 32767, -32768, -32768]


def test_a_recording_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.flac").write_bytes(b"no audio")
    with pytest.raises(CommandError, match=r"x\.flac"):
        audio.loop([tmp_path / "x.flac"], 16000)


def test_the_source_trees_recordings_are_the_default() -> None:
    assert len(audio.recordings(None)) >= 8
    assert audio.recordings([Path("a")]) == [Path("a")]
