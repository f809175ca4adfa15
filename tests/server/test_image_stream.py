"""Image.Stream over gRPC, with the small engine."""

from __future__ import annotations

import io
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from realtide_client.v1 import common_pb2, models_pb2, models_pb2_grpc
from tests.engines.easycontrol.small import EACH, Small
from tests.server.helpers import failure, responses, until
from tests.server.image_helpers import (
    JPEG,
    PNG,
    RAW,
    Images,
    Request,
    cancelling,
    checkpointing,
    finishing,
    forgetting,
    images_of,
    kinds,
    opening,
    picture,
    serving,
    until_kind,
    upload,
    wanting,
)


async def made(server: Images, *requests: Any, **options: Any) -> list[Any]:
    """All responses of a session after `opened`."""
    call = await server.opened(**options)
    for request in requests:
        await call.write(request)
    await call.write(finishing())
    return await responses(call)


async def test_an_image_from_two_conditions() -> None:
    async with serving() as server:
        found = await made(
            server,
            upload("sketch", "canny"),
            upload("who", "subject", picture(2, (20, 40), "JPEG")),
            wanting("one", ("sketch", 0.8), ("who", None), preview_interval=1),
        )
        assert kinds(found)[:2] == ["accepted", "applied"]
        assert kinds(found)[-1] == "image"
        assert kinds(found).count("progress") == 3
        previews = [one.preview for one in found if one.WhichOneof("message") == "preview"]
        assert [(one.step, one.width, one.height, len(one.data)) for one in previews] == [
            (1, 16, 12, 3 * 16 * 12), (2, 16, 12, 3 * 16 * 12),
        ]  # fmt: skip
        ready = next(one.conditions_ready for one in found if one.WhichOneof("message") == "conditions_ready")
        assert (ready.hits, ready.misses, ready.position) == (0, 2, 0)
        (image,) = images_of(found)
        assert (image.position, image.control_id, image.width, image.height, image.seed) == (
            0,
            "one",
            32,
            24,
            7,
        )
        assert len(image.data) == 3 * 32 * 24
        assert image.timing.processing_seconds > 0
        assert image.timing.processed_position == 1
        await server.all_free()
        assert server.metric("realtide_images_total") == 1
        assert server.metric("realtide_first_preview_seconds_count") == 1
        assert server.metric("realtide_image_seconds_count") == 1
        assert server.metric("realtide_condition_cache_misses_total") == 2
        for stage in ("text", "condition", "denoise", "preview", "vae"):
            assert server.metric("realtide_step_seconds_count", stage=stage) > 0


async def test_handles_are_reused_over_seeds_and_conditions_replaced() -> None:
    async with serving() as server:
        found = await made(
            server,
            upload(),
            wanting("a", ("sketch", None)),
            wanting("b", ("sketch", None), seed=8),
            upload(data=picture(5)),
            wanting("c", ("sketch", None)),
            forgetting("f", "sketch"),
            wanting("d"),
        )
        images = images_of(found)
        assert [image.control_id for image in images] == ["a", "b", "c", "d"]
        assert len({image.data for image in images}) == 4
        assert server.metric("realtide_condition_cache_hits_total") == 1
        assert server.metric("realtide_condition_cache_misses_total") == 2


async def test_every_encoding_is_the_same_image() -> None:
    async with serving() as server:
        raw, png, jpeg = [
            images_of(await made(server, wanting(), encoding=encoding))[0].data
            for encoding in (RAW, PNG, JPEG)
        ]
        pixels = np.frombuffer(raw, np.uint8).reshape(24, 32, 3)
        assert Image.open(io.BytesIO(png)).format == "PNG"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)
        assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
        lossy = np.asarray(Image.open(io.BytesIO(jpeg)), int)
        assert np.abs(lossy - pixels).mean() < 12


async def test_sessions_of_one_shape_share_steps() -> None:
    async with serving(Small(slots=4)) as server:
        calls = [await server.opened() for _ in range(3)]
        for number, call in enumerate(calls):
            await call.write(wanting("one", steps=10, seed=number))
            await call.write(finishing())
        assert [len(images_of(await responses(call))) for call in calls] == [1, 1, 1]
        alone = images_of(await made(server, wanting("one", steps=10, seed=1)))
        again = images_of(await made(server, wanting("one", steps=10, seed=1)))
        assert alone[0].data == again[0].data


async def test_cancelled_half_way() -> None:
    small = Small()
    async with serving(small) as server:
        call = await server.opened()
        await call.write(upload())
        await call.write(wanting("long", ("sketch", None), steps=10))
        await call.write(wanting("queued"))
        await until_kind(call, "progress")
        await call.write(cancelling("stop", "long"))
        await call.write(finishing())
        found = await responses(call)
        gone = [one.cancelled for one in found if one.WhichOneof("message") == "cancelled"]
        images = images_of(found)
        # Its last steps may have been faster than the cancel.
        assert [(one.position, one.control_id) for one in gone] == [(0, "long")] or len(images) == 2
        assert images[-1].control_id == "queued"
        applied = {one.applied.control_id for one in found if one.WhichOneof("message") == "applied"}
        assert applied == {"stop", "queued"}
        await server.all_free()
        assert small.store.held == 0


async def test_a_lost_client_gives_memory_back() -> None:
    small = Small()
    async with serving(small) as server:
        call = await server.opened()
        await call.write(upload())
        await call.write(wanting("long", ("sketch", None), steps=10))
        await until_kind(call, "progress")
        call.cancel()
        await server.all_free()
        await until(lambda: small.store.held == 0)
        assert server.metric("realtide_sessions_closed_total", outcome="cancelled") == 1


async def test_a_session_goes_on_from_its_checkpoint() -> None:
    async with serving() as server:
        want = images_of(await made(server, upload(), wanting("long", ("sketch", None), steps=10)))[0]
        call = await server.opened()
        await call.write(upload())
        await call.write(wanting("first"))
        await call.write(wanting("long", ("sketch", None), steps=10))
        await until_kind(call, "image")
        await until_kind(call, "progress")
        await call.write(checkpointing("now"))
        saved = await until_kind(call, "checkpoint")
        assert (saved.request_id, saved.position) == ("now", 1)
        call.cancel()
        await server.all_free()
    async with serving() as server:
        call = server.stream()
        await call.write(Request(resume=common_pb2.Resume(checkpoint=saved.data)))
        opened = (await call.read()).opened
        assert (opened.session.resumed, opened.session.position) == (True, 1)
        await call.write(finishing())
        image = images_of(await responses(call))[0]
        assert (image.position, image.control_id) == (1, "long")
        have, wanted = (np.frombuffer(one.data, np.uint8).astype(int) for one in (image, want))
        np.testing.assert_allclose(have, wanted, atol=1)


async def test_drain_hands_out_a_checkpoint() -> None:
    async with serving(drain_seconds=20.0) as server:
        call = await server.opened()
        await call.write(wanting("long", steps=10))
        await until_kind(call, "progress")
        server.server.drain()
        going = await until_kind(call, "going_away")
        assert going.checkpoint.data
        await call.write(finishing())
        assert len(images_of(await responses(call))) == 1


async def test_periodic_checkpoints_count_images() -> None:
    async with serving() as server:
        call = await server.opened(session=common_pb2.SessionOptions(checkpoint_interval_ms=2000))
        for number in range(3):
            await call.write(wanting(str(number), steps=1))
        saved = await until_kind(call, "checkpoint")
        assert saved.position in (2, 3)  # a third one may have been quicker than the export
        assert not saved.request_id
        await call.write(finishing())
        await responses(call)


async def test_the_model_describes_itself() -> None:
    async with serving() as server:
        stub: Any = models_pb2_grpc.ModelsStub(server.channel)
        model = (await stub.DescribeModel(models_pb2.DescribeModelRequest(name="small"))).model
        assert model.engine == "easycontrol"
        assert [(kind.name, kind.role) for kind in model.image.kinds] == [
            ("canny", models_pb2.CONDITION_ROLE_SPATIAL),
            ("depth", models_pb2.CONDITION_ROLE_SPATIAL),
            ("subject", models_pb2.CONDITION_ROLE_SUBJECT),
        ]
        assert (model.image.condition_bytes, model.image.cache_bytes) == (EACH, 8 * EACH + 17)
        assert (model.image.guidance, model.image.steps, model.image.limits.max_conditions) == (3.5, 4, 2)


async def test_another_kind_of_stream_is_told_so() -> None:
    async with serving() as server:
        from realtide_client.v1 import speech_pb2_grpc
        from tests.server.helpers import opening as speaking

        stub: Any = speech_pb2_grpc.SpeechStub(server.channel)
        call = stub.Stream()
        await call.write(speaking(session=common_pb2.SessionOptions(model="small")))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "'small' is a image model" in (error.details() or "")


@pytest.mark.parametrize("silent", [True, False])
async def test_a_silent_client_is_closed_only_if_nothing_is_owed_to_it(silent: bool) -> None:
    async with serving(idle_timeout=0.3) as server:
        call = await server.opened()
        if not silent:
            await call.write(wanting("long", steps=10))
            await until_kind(call, "image")
        assert (await failure(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert opening().open.options.encoding == RAW
