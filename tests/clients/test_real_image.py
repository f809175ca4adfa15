"""The client of images against the real server and the small engine."""

from __future__ import annotations

import asyncio

import pytest

import realtide_client as rt
from realtide_client import sync
from tests.engines.easycontrol.small import Small
from tests.server.image_helpers import picture, serving


async def test_images_with_conditions_previews_and_a_reused_handle() -> None:
    async with serving() as server:
        address = f"127.0.0.1:{server.server.port}"
        async with rt.connect(address) as client, client.image(encoding="raw_rgb") as stream:
            sketch = await stream.condition("canny", picture(1))
            who = await stream.condition("subject", picture(2))
            first = await stream.generate(
                "a frog",
                conditions=[sketch, (who, 0.5)],
                width=32,
                height=24,
                steps=3,
                seed=1,
                preview_interval=1,
            )
            second = await stream.generate(
                "a frog", conditions=[sketch, (who, 0.5)], width=32, height=24, steps=3
            )
            assert (await first.applied()).position == 0
            await stream.finish()
            events = [event async for event in stream]
        images = [event for event in events if isinstance(event, rt.Image)]
        assert [image.control_id for image in images] == [first.control_id, second.control_id]
        assert images[0].rgb.shape == (24, 32, 3)
        assert images[0].seed == 1
        previews = [event for event in events if isinstance(event, rt.Preview)]
        assert [(event.control_id, event.step) for event in previews] == [
            (first.control_id, n) for n in (1, 2)
        ]
        ready = [event for event in events if isinstance(event, rt.ConditionsReady)]
        assert [(event.control_id, event.hits, event.misses) for event in ready] == [
            (first.control_id, 0, 2), (second.control_id, 2, 0),
        ]  # fmt: skip
        steps = [event.step for event in events if isinstance(event, rt.Progress)]
        assert steps == [1, 2, 3, 1, 2, 3]


async def test_calling_off() -> None:
    async with serving() as server:
        async with (
            rt.connect(f"127.0.0.1:{server.server.port}") as client,
            client.image(encoding="raw_rgb") as stream,
        ):
            await stream.generate("a frog", steps=10)
            unwanted = await stream.generate("a cat", steps=10)
            await stream.cancel(unwanted)
            await stream.finish()
            events = [event async for event in stream]
        assert [event.control_id for event in events if isinstance(event, rt.ImageCancelled)] == [
            unwanted.control_id
        ]
        assert len([event for event in events if isinstance(event, rt.Image)]) == 1


async def test_conditions_of_elsewhere_and_bad_choices() -> None:
    async with serving() as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        with pytest.raises(ValueError, match="encoding must be one of raw_rgb, jpeg, png"):
            client.image(encoding="gif")
        async with client.image() as stream, client.image() as other:
            foreign = await other.condition("canny", picture(1))
            with pytest.raises(ValueError, match="no condition of this session"):
                await stream.generate("a frog", conditions=[foreign])
            await stream.generate("a frog", steps=99)
            with pytest.raises(rt.InvalidRequest) as caught:
                await anext(stream)
            assert caught.value.violations[0].field == "control.generate.steps"


async def test_a_drained_server_hands_the_session_over() -> None:
    """The image under way goes on elsewhere, those behind it are asked for again, none comes twice."""
    async with serving(Small(), drain_seconds=0.3) as first, serving(Small()) as second:
        ports = [first.server.port, second.server.port]
        async with rt.connect(f"ipv4:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}") as client:
            async with client.image(encoding="raw_rgb") as stream:
                sketch = await stream.condition("canny", picture(1))
                asked = [
                    await stream.generate("a frog", conditions=[sketch], steps=10, seed=number)
                    for number in range(4)
                ]
                images = []
                async for event in stream:
                    if isinstance(event, rt.Image):
                        images.append(event)
                    if isinstance(event, rt.Progress) and event.step == 3 and len(images) == 1:
                        first.server.drain()
                    if len(images) == 4:
                        break
                await stream.finish()
            assert [image.control_id for image in images] == [control.control_id for control in asked]
            assert len({image.data for image in images}) == 4


async def test_without_asyncio() -> None:
    async with serving() as server:
        address = f"127.0.0.1:{server.server.port}"

        def work() -> list[rt.ImageEvent]:
            with sync.connect(address) as client, client.image(encoding="png") as stream:
                sketch = stream.condition("canny", picture(1))
                control = stream.generate("a frog", conditions=[sketch], steps=2)
                assert control.applied(timeout=10).position == 0
                stream.finish()
                return list(stream)

        events = await asyncio.to_thread(work)
        (image,) = [event for event in events if isinstance(event, rt.Image)]
        assert image.data.startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="have to be decoded first"):
            image.rgb  # noqa: B018
