"""Health, reflection and the Models service."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from realtide_client.v1 import common_pb2, models_pb2, models_pb2_grpc, speech_pb2
from tests.engines.easycontrol.small import Small
from tests.server import image_helpers
from tests.server.engine import BurstEngine, pcm16, tone
from tests.server.helpers import (
    EOF,
    Live,
    audio,
    failure,
    finish,
    opening,
    responses,
    running,
    until,
    violation,
)
from tests.server.video_engine import ClipEngine
from tests.server.video_helpers import H264, JPEG, RAW, Clips, clips

SPEECH, VIDEO, IMAGE, MODELS = (f"realtide.v1.{name}" for name in ("Speech", "Video", "Image", "Models"))
SERVING, NOT_SERVING = 1, 2


async def health(server: Live, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(server.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def becomes(server: Live, **wanted: int) -> None:
    names = {"whole": "", "speech": SPEECH, "video": VIDEO, "image": IMAGE, "models": MODELS}
    async with asyncio.timeout(10):
        while {name: await health(server, names[name]) for name in wanted} != wanted:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("strict", [False, True])
async def test_health_follows_slots_and_drain(strict: bool) -> None:
    async with running(BurstEngine(slots=2), full_is_unhealthy=strict, drain_seconds=5.0) as server:
        await becomes(server, whole=SERVING, speech=SERVING, video=NOT_SERVING, models=SERVING)
        calls = [await server.opened()]
        await becomes(server, speech=SERVING)
        calls.append(await server.opened())
        await becomes(server, whole=NOT_SERVING if strict else SERVING, speech=NOT_SERVING, models=SERVING)
        calls.pop().cancel()
        await becomes(server, whole=SERVING, speech=SERVING)
        server.server.drain()
        await becomes(server, whole=NOT_SERVING, speech=NOT_SERVING, models=NOT_SERVING)
        await calls[0].write(finish())
        await responses(calls[0])
        await becomes(server, whole=NOT_SERVING, speech=NOT_SERVING)  # a free slot does not end a drain


async def test_each_kind_of_model_has_its_own_health() -> None:
    async with running(BurstEngine(slots=1), more=[ClipEngine(slots=1)], full_is_unhealthy=True) as server:
        await becomes(server, whole=SERVING, speech=SERVING, video=SERVING)
        video = Clips(server.server, ClipEngine(), server.channel)
        clip = await video.opened()
        await becomes(server, whole=SERVING, speech=SERVING, video=NOT_SERVING)
        speech = await server.opened()
        await becomes(server, whole=NOT_SERVING, speech=NOT_SERVING, video=NOT_SERVING)
        clip.cancel()
        await becomes(server, whole=SERVING, speech=NOT_SERVING, video=SERVING)
        speech.cancel()


async def test_images_have_theirs_too() -> None:
    async with image_helpers.serving(Small(slots=1)) as server:
        await becomes(server, whole=SERVING, speech=NOT_SERVING, image=SERVING)
        call = await server.opened()
        await becomes(server, whole=SERVING, image=NOT_SERVING)
        call.cancel()
        await becomes(server, image=SERVING)
        server.server.drain()
        await becomes(server, whole=NOT_SERVING, image=NOT_SERVING)


async def test_a_failed_engine_is_unhealthy_and_refuses() -> None:
    async with running() as server:
        call = await server.opened()

        # An error that is no session's fault, in the middle of the executor's own work.
        server.server.host.models["bursts"].executors[0]._hooks = None  # type: ignore[assignment]
        await call.write(audio(pcm16(tone(0.1))))
        assert (await failure(call)).code() == grpc.StatusCode.INTERNAL
        await becomes(server, whole=NOT_SERVING, speech=NOT_SERVING)
        late = server.stream()
        await late.write(opening())
        assert (await failure(late)).code() == grpc.StatusCode.UNAVAILABLE
        assert server.metric("realtide_admission_refused_total", reason="failed") == 1


async def test_watchers_are_told() -> None:
    async with running(BurstEngine(slots=1)) as server:
        stub: Any = health_pb2_grpc.HealthStub(server.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SPEECH))
        assert (await watch.read()).status == SERVING
        call = await server.opened()
        assert (await watch.read()).status == NOT_SERVING
        call.cancel()
        assert (await watch.read()).status == SERVING
        watch.cancel()


async def test_reflection_lists_the_services() -> None:
    async with running() as server:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        names = {one.name for one in reply.list_services_response.service}
        assert names >= {SPEECH, VIDEO, MODELS, "grpc.health.v1.Health"}
        for service in (SPEECH, VIDEO):
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=service))
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()
        assert await call.read() is EOF


async def test_models_are_listed_and_described() -> None:
    async with running(BurstEngine(slots=3), more=[BurstEngine(model="another")], queue_limit=9) as server:
        stub: Any = models_pb2_grpc.ModelsStub(server.channel)
        listed = await stub.ListModels(models_pb2.ListModelsRequest())
        assert [model.name for model in listed.models] == ["another", "bursts"]
        call = await server.opened(session=common_pb2.SessionOptions(model="bursts"))
        await until(lambda: server.engine.free_slots == 2)
        model = (await stub.DescribeModel(models_pb2.DescribeModelRequest(name="bursts"))).model
        assert (model.version, model.engine, model.backend) == ("1.2", "bursts-engine", "onnxruntime")
        assert (model.precision, model.device, model.license) == ("fp32", "cpu", "Apache-2.0")
        assert model.state == models_pb2.MODEL_STATE_READY
        assert (model.capacity.slots, model.capacity.free_slots, model.capacity.max_queued) == (3, 2, 9)
        assert model.limits.max_message_bytes == 1 << 20
        speech = model.speech
        assert list(speech.language_codes) == ["en-US", "en-GB"]
        assert list(speech.encodings) == [
            speech_pb2.AUDIO_ENCODING_LINEAR16,
            speech_pb2.AUDIO_ENCODING_FLOAT32,
        ]
        assert speech.default_options.endpointing.final_silence_ms == 800
        assert speech.limits.max_beam == 8
        call.cancel()


async def test_video_models_are_described() -> None:
    async with clips(more=[BurstEngine()], max_video_credit=2.0) as server:
        stub: Any = models_pb2_grpc.ModelsStub(server.channel)
        listed = await stub.ListModels(models_pb2.ListModelsRequest())
        assert [model.WhichOneof("kind") for model in listed.models] == ["speech", "video"]
        model = listed.models[1]
        assert (model.name, model.engine, model.capacity.slots) == ("clips", "clips-engine", 4)
        video = model.video
        assert [(size.width, size.height) for size in video.sizes] == [(32, 16), (16, 16)]
        assert list(video.encodings) == [RAW, JPEG, H264]
        assert (video.frames_per_second, video.first_block_frames, video.block_frames) == (16.0, 3, 4)
        assert video.session_bytes == 12345
        assert (video.limits.max_credit_frames, video.limits.max_prompt_tokens) == (32, 8)


async def test_describing_what_is_not_there() -> None:
    async with running() as server:
        stub: Any = models_pb2_grpc.ModelsStub(server.channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.DescribeModel(models_pb2.DescribeModelRequest(name="nobody"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.DescribeModel(models_pb2.DescribeModelRequest())
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violation(error.value)[0] == "name"
