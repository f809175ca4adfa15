"""What is exposed is what is documented, and the numbers mean what the documentation says."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from realtide.engines.ancat.types import EndpointEvent, Final, Partial, Word
from realtide.server.metrics import BatchHistogram, Metrics
from realtide.server.speech_meter import SpeechMeter
from realtide_client.v1 import common_pb2, models_pb2, models_pb2_grpc
from tests.engines.easycontrol.small import Small
from tests.server.engine import BurstEngine, pcm16, quiet, tone
from tests.server.helpers import Request, audio, failure, finish, opening, responses, running, until
from tests.server.image_helpers import Images, upload, wanting
from tests.server.image_helpers import finishing as no_more
from tests.server.video_engine import ClipEngine
from tests.server.video_helpers import Clips, clips, credit, finishing, prompting, until_frame

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
OF_THE_SERVER = (
    "realtide_build_info",
    "realtide_calls_refused_total",
    "realtide_device_memory_bytes",
    "realtide_event_loop_lag_seconds",
    "realtide_reload_failures_total",
)
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\| .+ \|$")


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels (beside those that its kind always has)."""
    found = {}
    for line in DOCUMENT.read_text().splitlines():
        if match := ROW.match(line):
            name, kind, labels = match.groups()
            found[name] = (kind, {label.strip() for label in labels.split(",") if label.strip()})
    return found


async def busy(server: Any) -> None:
    """Give every metric a value."""
    call = await server.opened()
    await call.write(audio(pcm16(np.concatenate([tone(0.2), quiet(1.0)]))))
    await call.write(Request(checkpoint_request=common_pb2.CheckpointRequest()))
    while (response := await call.read()).WhichOneof("message") != "checkpoint":
        pass
    await call.write(finish())
    await responses(call)
    resumed = server.stream()
    await resumed.write(Request(resume=common_pb2.Resume(checkpoint=response.checkpoint.data)))
    await resumed.write(finish())
    await responses(resumed)
    bad = server.stream()
    await bad.write(opening(rate=1))
    await failure(bad)
    await film(Clips(server.server, ClipEngine(), server.channel))


async def film(server: Clips) -> None:
    """The same for video: frames, and a prompt that changes while they come."""
    call = await server.opened(credit=5)
    await until_frame(call, 5)
    await call.write(prompting("p", "another"))
    await call.write(credit(9))
    await call.write(finishing())
    await responses(call)


async def draw(server: Any) -> None:
    """The same for images: one with a condition and a preview."""
    call = await Images(server.server, None, server.channel).opened()
    await call.write(upload())
    await call.write(wanting("one", ("sketch", None), preview_interval=1))
    await call.write(no_more())
    await responses(call)


async def test_the_documented_metrics_are_the_exposed_ones() -> None:
    images: Any = Small().engine
    async with running(more=[ClipEngine(), images], metrics_enabled=True) as server:
        server.server.metrics.model_load.labels("bursts-engine", "bursts").set(0.1)
        await busy(server)
        await draw(server)
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="ok") == 2)
        text = await asyncio.to_thread(server.exposition)
    exposed: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, f"{name} has no value after a session"
        general = {"engine", "model"} if name.startswith("realtide_") else set()
        general = {"grpc_type", "grpc_service", "grpc_method"} if name.startswith("grpc_") else general
        if name in OF_THE_SERVER:
            general = set()
        assert general <= labels, name
        exposed[name] = (family.type, labels - general)
    assert exposed == documented()


async def test_no_label_holds_what_belongs_to_a_client() -> None:
    async with running(metrics_enabled=True) as server:
        call = server.stream()
        await call.write(opening())
        session_id = (await call.read()).opened.session.session_id
        await call.write(audio(pcm16(tone(0.2))))
        await call.write(finish())
        await responses(call)
        text = await asyncio.to_thread(server.exposition)
    assert session_id not in text
    assert "burst1" not in text


async def test_sessions_by_state_and_outcome() -> None:
    async with running(BurstEngine(slots=2)) as server:
        assert server.metric("realtide_session_capacity") == 2
        first = await server.opened()
        assert server.metric("realtide_sessions", state="active") == 1
        await first.write(finish())
        await responses(first)
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="ok") == 1)
        assert server.metric("realtide_sessions", state="active") == 0
        assert server.metric("realtide_sessions_opened_total") == 1
        assert server.metric("realtide_session_duration_seconds_count") == 1


def test_a_histogram_of_many_values_at_once_is_what_one_of_single_values_would_be() -> None:
    values = [0.0, 0.001, 0.0011, 0.5, 5.0, 5.1, 1000.0]
    single, many = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("x", "y", ("engine", "model"), buckets=(0.001, 0.5, 5), registry=single)
    for value in values:
        histogram.labels("a", "b").observe(value)
    batch = BatchHistogram("x", "y", (0.001, 0.5, 5))
    many.register(batch)
    batch.begin(("a", "b"))
    batch.observe_all(("a", "b"), values[:3])
    batch.observe_all(("a", "b"), values[3:])

    def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("le", "")): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    assert samples(many) == pytest.approx(samples(single))
    assert samples(many)["x_count", ""] == len(values)


async def test_a_session_that_the_engine_has_put_aside_is_parked() -> None:
    async with clips(ClipEngine(slots=3)) as server:
        calls = [await server.opened() for _ in range(2)]
        server.engine.parked = 1
        assert server.metric("realtide_sessions", state="parked") == 1
        assert server.metric("realtide_sessions", state="active") == 1
        for call in calls:
            call.cancel()


async def test_a_leaked_slot_shows() -> None:
    async with running() as server:
        call = await server.opened()
        server.engine.taken += 1  # a slot that no session holds
        call.cancel()
        await until(lambda: server.metric("realtide_slots_leaked") == 1)


async def test_steps_are_counted() -> None:
    async with running(BurstEngine(budget=-1.0)) as server:
        call = await server.opened()
        await call.write(audio(pcm16(quiet(0.4))))
        await call.write(finish())
        await responses(call)
        steps = server.metric("realtide_step_batch_size_count")
        assert steps >= 10
        assert server.metric("realtide_queue_wait_seconds_count") == steps
        assert server.metric("realtide_step_seconds_count", stage="encoder") == steps
        assert server.metric("realtide_deadline_misses_total") >= 10
        await until(lambda: server.metric("realtide_real_time_factor_count") == 1)


async def test_calls_and_messages_are_counted() -> None:
    async with running() as server:
        registry = server.server.metrics.registry

        def value(name: str, **labels: str) -> float:
            return registry.get_sample_value(name, labels) or 0.0

        speech = {
            "grpc_type": "bidi_stream",
            "grpc_service": "realtide.v1.Speech",
            "grpc_method": "Stream",
        }
        call = await server.opened()
        await call.write(audio(pcm16(quiet(0.1))))
        await call.write(finish())
        answers = await responses(call)
        bad = server.stream()
        await bad.write(opening(rate=1))
        await failure(bad)
        cancelled = await server.opened()
        # A message that the client has is counted only when the server's write returns, which a cancellation
        # can forestall.
        await until(lambda: value("grpc_server_msg_sent_total", **speech) == len(answers) + 2)
        cancelled.cancel()
        for code, count in (("OK", 1), ("InvalidArgument", 1), ("Cancelled", 1)):
            await until(
                lambda code=code, count=count: (
                    value("grpc_server_handled_total", grpc_code=code, **speech) == count
                )
            )
        assert value("grpc_server_started_total", **speech) == 3
        assert value("grpc_server_msg_received_total", **speech) == 5
        assert value("grpc_server_msg_sent_total", **speech) == len(answers) + 2
        assert value("grpc_server_handling_seconds_count", **speech) == 3
        models: Any = models_pb2_grpc.ModelsStub(server.channel)
        await models.ListModels(models_pb2.ListModelsRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await models.DescribeModel(models_pb2.DescribeModelRequest(name="x"))
        unary = {"grpc_type": "unary", "grpc_service": "realtide.v1.Models"}
        assert value("grpc_server_handled_total", grpc_method="ListModels", grpc_code="OK", **unary) == 1
        # An abort sends the status before the handler ends.
        await until(
            lambda: (
                value("grpc_server_handled_total", grpc_method="DescribeModel", grpc_code="NotFound", **unary)
                == 1
            )
        )


async def test_the_loop_that_is_blocked_shows_as_lag() -> None:
    async with running() as server:
        registry = server.server.metrics.registry

        def late() -> float:
            count = registry.get_sample_value("realtide_event_loop_lag_seconds_count") or 0.0
            return count - (
                registry.get_sample_value("realtide_event_loop_lag_seconds_bucket", {"le": "0.1"}) or 0
            )

        before = late()
        await asyncio.sleep(0.06)
        import time

        time.sleep(0.2)  # noqa: ASYNC251 (that is the point)
        await until(lambda: late() > before)


def words(*spans: tuple[str, float, float]) -> tuple[Word, ...]:
    return tuple(Word(text, start, end, 1.0, 0.2) for text, start, end in spans)


def test_delays_are_measured_from_the_arrival_of_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 kHz; 100 ms messages; sample n arrives at the end of its message, at clock 100 + that."""
    metrics = Metrics("0")
    model = metrics.for_model("e", "m")
    meter = SpeechMeter(metrics, model, 16000, 0)
    for index in range(40):
        meter.audio((index + 1) * 1600, 100.0 + (index + 1) * 0.1)
    now = [0.0]
    monkeypatch.setattr("realtide.server.speech_meter.time.monotonic", lambda: now[0])

    def sums(name: str) -> Any:
        registry = metrics.registry
        labels = {"engine": "e", "model": "m"}
        return (
            registry.get_sample_value(f"realtide_{name}_count", labels) or 0.0,
            registry.get_sample_value(f"realtide_{name}_sum", labels) or 0.0,
        )

    def partial(text: str, *spans: tuple[str, float, float]) -> None:
        meter.partial(Partial(text, words(*spans), 0.5, 2.0, 0.1, 0))

    meter.endpoint(EndpointEvent("speech_start", 0.55, 0))
    now[0] = 101.0
    partial("")
    assert sums("first_partial_seconds") == (0, 0)
    partial("one", ("one", 0.55, 0.8))
    # The sample at 0.55 s came with the message that ended at 0.6 s; the one before 0.8 s at 0.8 s.
    assert sums("first_partial_seconds") == (1, pytest.approx(0.4))
    assert sums("word_delay_seconds") == (1, pytest.approx(0.2))
    now[0] = 102.0
    partial("one two", ("one", 0.55, 0.8), ("two", 1.0, 1.25))
    assert sums("word_delay_seconds") == (2, pytest.approx(0.2 + 0.7))
    partial("one", ("one", 0.55, 0.8))
    partial("one two", ("one", 0.55, 0.8), ("two", 1.0, 1.25))
    assert sums("word_delay_seconds")[0] == 2  # taken back and given again: not its first appearance
    assert sums("first_partial_seconds")[0] == 1
    now[0] = 102.5
    meter.final(
        Final(
            "one too", words(("one", 0.55, 0.8), ("too", 1.0, 1.25)), 1, 0, 2.1, 1.25, 2.1, 0.1, 0.2, 0, "x"
        )
    )
    assert sums("word_delay_seconds") == (3, pytest.approx(0.2 + 0.7 + 1.2))  # corrected
    assert sums("final_delay_seconds") == (1, pytest.approx(102.5 - 101.3))
    assert sums("lookahead_seconds") == (2, pytest.approx(0.4))
    # The next utterance is measured anew; without words the start is the engine's event.
    meter.endpoint(EndpointEvent("speech_start", 3.0, 1))
    now[0] = 104.0
    partial("three")
    assert sums("first_partial_seconds") == (2, pytest.approx(0.4 + 0.9))
    meter.final(Final("", (), 0, 2.1, 4.0, 2.1, 4.0, 0.1, 0.2, 1, "no_speech"))
    assert sums("final_delay_seconds")[0] == 1
    meter.close(busy=0.4)
    assert sums("real_time_factor") == (1, pytest.approx(0.1))
    assert sums("audio_seconds") == (0, 0)
    assert metrics.registry.get_sample_value(
        "realtide_audio_seconds_total", {"engine": "e", "model": "m"}
    ) == pytest.approx(4.0)
