"""The load generator against a real server, and the engine alone, with a tiny bundle. No figure is judged."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from realtide.bench import audio, child, client_load, plan
from realtide.bench.plan import Plan
from realtide.bench.served import trial
from realtide.bench.speech import Bench, Measure, lines, verdict
from realtide.cli.errors import CommandError
from realtide.cli.own_server import own_server
from realtide_client.v1 import speech_pb2 as pb
from tests.bench.conftest import AUDIO, Tiny
from tests.cli.conftest import Run


def load(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "streams": 3, "seconds": 2.0, "warmup": 1.0, "chunk_ms": 40, "probe_ms": 200, "rate": 16000,
        "audio": (str(AUDIO / "coffee-mocha.flac"), str(AUDIO / "digit-three.flac")),
    }  # fmt: skip
    return Plan(**{**values, **changes})


async def test_three_streams_are_measured_by_client_and_server(tiny: Tiny) -> None:
    async with own_server([tiny.path], ("slots=3", "queue_limit=0")) as server:
        given = load(address=server.address)
        found = await trial(given, server.metrics_url)
    assert found["failed_streams"] == found["unfinished_streams"] == 0, found["failures"]
    assert found["generator"]["chunks"] in range(3 * 50 - 3, 3 * 50 + 4)
    # A probe follows every fifth of 50 chunks of three streams; a machine that stands still leaves some out.
    probes = found["probes"]
    assert sum(probes.values()) in range(27, 34)
    assert probes["answered"] > 0
    assert found["processing_delay"]["count"] == probes["answered"] + probes["unanswered"]
    assert 0 < found["processing_delay"]["p50_ms"] <= found["processing_delay"]["p99_ms"]
    results = found["results"]
    assert results["partials"] + results["finals"] == results["behind_audio"]["count"] > 0
    server_view = found["server"]
    assert server_view["audio_seconds"] > 0
    assert set(server_view["step"]) == {"features", "encoder", "decoder"}
    assert server_view["step"]["encoder"]["count"] > 0
    assert server_view["queue_wait"]["count"] > 0
    assert server_view["resident_bytes"] > 1 << 24
    assert server_view["cpu_seconds"] > 0
    json.dumps(found, allow_nan=False)


async def test_the_engine_alone_works_through_every_chunk(tiny: Tiny) -> None:
    events: list[str] = []

    async def on_event(name: str, pid: int) -> None:
        events.append(name)

    given = load(bundle=str(tiny.path), precision="fp32")
    found = await child.run("realtide.bench.engine_load", given, on_event)
    assert events == ["begin", "end"]
    assert found["processing_delay"]["count"] in range(3 * 50 - 3, 3 * 50 + 4)
    assert found["engine"]["steps"] > 0
    assert found["engine"]["mean_batch"] >= 1
    assert set(found["engine"]["stage_share_of_time"]) == {"features", "encoder", "decoder"}
    assert found["results"]["partials"] + found["results"]["finals"] > 0


async def test_more_streams_than_slots_are_refused_in_a_sentence(tiny: Tiny) -> None:
    async with own_server([tiny.path], ("slots=2", "queue_limit=0")) as server:
        with pytest.raises(CommandError, match="RESOURCE_EXHAUSTED"):
            await trial(load(address=server.address), None)


async def test_chunks_shorter_than_a_frame_are_refused(tiny: Tiny) -> None:
    async with own_server([tiny.path], ("slots=4",)) as server:
        with pytest.raises(client_load.LoadError, match="40 ms"):
            await asyncio.to_thread(
                client_load.run, load(address=server.address, chunk_ms=20), lambda event: None
            )


async def test_a_child_that_fails_says_why() -> None:
    async def nothing(name: str, pid: int) -> None:
        pass

    given = load(bundle="/nowhere")
    with pytest.raises(CommandError, match="nowhere"):
        await asyncio.wait_for(child.run("realtide.bench.engine_load", given, nothing), 60)


def test_messages_are_what_the_contract_says() -> None:
    given = load(lookahead_bias=1.5, max_lookahead_ms=80, model="m")
    sends = client_load.messages(given)

    def request(message: bytes) -> pb.SpeechStreamRequest:
        assert message[:5] == b"\0" + (len(message) - 5).to_bytes(4, "big")
        return pb.SpeechStreamRequest.FromString(message[5:])

    opening = request(sends.open).open
    assert (opening.session.model, opening.audio.sample_rate_hz) == ("m", 16000)
    assert (opening.options.lookahead_bias, opening.options.max_lookahead_ms) == (1.5, 80)
    assert not request(client_load.messages(load()).open).open.options.HasField("lookahead_bias")
    sizes = {len(request(chunk).audio.data) for chunk in sends.chunks}
    assert sizes == {2 * given.size}
    probes = [request(probe).control for probe in sends.probes]
    assert len({probe.control_id for probe in probes}) == client_load.PROBES
    assert all(probe.set_interim_results.enabled for probe in probes)
    assert request(sends.finish).HasField("finish")
    assert len(sends.chunks) == len(
        audio.chunks(audio.loop([Path(p) for p in given.audio], 16000), given.size)
    )
    assert len(plan.streams(given, len(sends.chunks))) == 3


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, True),
        ({"failed_streams": 1}, False),
        ({"unfinished_streams": 1}, False),
        ({"processing_delay": {"p99_ms": 100.0}}, False),
        ({"processing_delay": {"p99_ms": None}}, False),
    ],
)
def test_a_load_is_held_only_if_no_stream_was_lost_or_late(change: dict[str, Any], held: bool) -> None:
    result = {"processing_delay": {"p99_ms": 99.9}, "failed_streams": 0, "unfinished_streams": 0} | change
    assert verdict(result, 100.0) is held


def test_a_search_that_was_refused_counts_as_not_held() -> None:
    assert not verdict({"streams": 9, "error": "RESOURCE_EXHAUSTED"}, 100.0)


async def test_a_search_takes_turns_keeps_every_trial_and_confirms_the_best() -> None:
    bench = Bench(load(streams=2), 100.0, 1.0, 4, 64, search=True)
    asked: list[tuple[str, int, float]] = []

    def measure(name: str, cost: float) -> Measure:
        async def measured(given: Plan) -> dict[str, Any]:
            asked.append((name, given.streams, given.seconds))
            delay = {"p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": cost * given.streams, "count": 10}
            return {"streams": given.streams, "processing_delay": delay}

        return measured

    found = await bench._search({"served": measure("served", 2.5), "alone": measure("alone", 2.0)})
    short = [name for name, _, seconds in asked if seconds == 1.0]
    assert short == ["served", "alone"] * (len(short) // 2)
    assert found["served"]["half_pass"]["streams"] == pytest.approx(40, rel=0.05)
    assert found["alone"]["half_pass"]["streams"] == pytest.approx(50, rel=0.05)
    assert found["served_by_alone"] == pytest.approx(0.8, rel=0.05)
    for name, limit in (("served", 40), ("alone", 50)):
        one = found[name]
        assert one["streams"] == pytest.approx(limit - 1, abs=1.5)
        assert one["half_pass"]["trials"] >= 4
        assert one["result"] == one["trials"][-1]
        assert (one["result"]["streams"], one["result"]["seconds"]) == (one["streams"], 2.0)
        assert [(name, t["streams"], t["seconds"]) for t in one["trials"]] == [
            trial for trial in asked if trial[0] == name
        ]
    text = lines({"alone": found["alone"], "limit_ms": 100.0})
    assert any("half of the trials pass" in line for line in text)


async def test_a_search_whose_single_stream_is_refused_says_why() -> None:
    bench = Bench(load(streams=2), 100.0, 1.0, 4, 64, search=True)

    async def refused(given: Plan) -> dict[str, Any]:
        raise CommandError("no slot")

    with pytest.raises(CommandError, match="no slot"):
        await bench._search({"served": refused})


def test_the_command_prints_a_result_that_says_all(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "speech.json"
    done = run(
        "bench", "speech", "--bundle", tiny.path, "--streams", "2", "--seconds", "1", "--warmup", "0.5",
        "--audio", AUDIO / "coffee-mocha.flac", "--json", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(out.read_text())
    assert result["benchmark"] == "speech"
    assert result["load"]["recordings"] == ["coffee-mocha.flac"]
    assert result["served"]["streams"] == 2
    assert result["served"]["server"]["real_time_factor"] > 0
    assert any("processing delay" in line for line in lines(result))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--server", "x:1", "--bundle", "b"), "own server"),
        (("--server", "x:1", "--compare"), "runs here"),
        (("--engine-only", "--compare"), "leave --engine-only out"),
        (("--search", "--streams", "9", "--max-streams", "8"), "--max-streams"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run("bench", "speech", *arguments)
    assert done.code == 2
    assert sentence in done.err
