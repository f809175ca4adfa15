"""Load by the real client: people who speak, watch videos whose prompts change, and draw."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import numpy as np
import soundfile
from PIL import Image as Picture

import realtide_client as rt

RECORDING = Path(__file__).resolve().parents[1] / "data" / "audio" / "coffee-mocha.flac"
BLOCK_SECONDS = 0.04


class Load:
    """Runs sessions, one after another, in a thread of its own; to be used with `with`.

    Args:
        address: a server of speech and video.
        images: a server of images, if there is one.
    """

    def __init__(self, address: str, images: str = "") -> None:
        self.address = address
        self.images = images
        self.finished = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        for work in (self.speak, self.watch, *([self.draw] if self.images else [])):
            self._tasks.append(asyncio.run_coroutine_threadsafe(self._again(work), self._loop))
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result(60)
        finally:
            # Whatever is left of the load, this process can end.
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def check(self) -> int:
        """Sessions so far; raises what one has failed with."""
        for task in self._tasks:
            if task.done():
                task.result()
        return self.finished

    async def _ended(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _again(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await work()
            self.finished += 1

    async def speak(self) -> None:
        """Two people who say a recording as it was spoken; one is on another stream after a second."""
        samples, rate = await asyncio.to_thread(soundfile.read, RECORDING, dtype="float32")
        samples = np.concatenate([samples, np.zeros(rate, np.float32)])
        async with rt.connect(self.address) as client:
            finals = await asyncio.gather(*(_say(client, samples, rate, cut) for cut in (0, rate)))
        assert all("mocha" in text for text in finals), finals

    async def watch(self) -> None:
        """One viewer, at the pace of the video; the prompt changes twice."""
        async with (
            rt.connect(self.address) as client,
            client.video(
                prompt="a red apple moves up on a blue background", length_frames=96, buffer_seconds=1.0
            ) as stream,
        ):
            changes = {30: "a red apple moves down on a blue background", 60: "a frog moves left"}
            shown = 0
            async for event in stream:
                if isinstance(event, rt.Frames):
                    await asyncio.sleep(event.count / 16)
                    for frame in [frame for frame in changes if frame <= event.position]:
                        await stream.set_prompt(changes.pop(frame))
                elif isinstance(event, rt.PromptApplied):
                    shown += 1
            assert shown >= 2

    async def draw(self) -> None:
        """Somebody who wants two images after one sketch, with previews."""
        sketch = io.BytesIO()
        Picture.fromarray(np.zeros((32, 32, 3), np.uint8)).save(sketch, "PNG")
        async with rt.connect(self.images) as client, client.image() as stream:
            condition = await stream.condition("canny", sketch.getvalue())
            for prompt in ("a red apple", "a frog"):
                await stream.generate(prompt, conditions=[condition], preview_interval=1)
            await stream.finish()
            images = [event async for event in stream if isinstance(event, rt.Image)]
        assert len(images) == 2


async def _say(client: rt.Client, samples: np.ndarray[Any, Any], rate: int, cut: int) -> str:
    """What was understood; with `cut` the session is resumed after so many samples."""
    checkpoint = None
    if cut:
        async with client.speech(sample_rate=rate) as first:
            await _send(first, samples[:cut], rate)
            checkpoint = await first.checkpoint()
    async with client.speech(sample_rate=rate, resume=checkpoint) as stream, asyncio.TaskGroup() as group:
        group.create_task(_send(stream, samples[cut:], rate, last=True))
        texts = [item.text async for item in stream if isinstance(item, rt.Final)]
    return " ".join(texts)


async def _send(
    stream: rt.SpeechStream, samples: np.ndarray[Any, Any], rate: int, *, last: bool = False
) -> None:
    block = round(BLOCK_SECONDS * rate)
    for start in range(0, len(samples), block):
        await stream.send(samples[start : start + block])
        await asyncio.sleep(BLOCK_SECONDS)
    if last:
        await stream.finish()
