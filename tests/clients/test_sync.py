"""The blocking client against the scripted server, which runs on a loop of its own."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import realtide_client as rt
from realtide_client import sync
from realtide_client.v1 import models_pb2_grpc, speech_pb2_grpc, video_pb2_grpc
from tests.clients import scripted_video
from tests.clients.scripted import UTTERANCE, Script, ScriptedSpeech, checksum


@pytest.fixture
def address() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        servicer = ScriptedSpeech(Script(drop_at={0: 4000}))
        speech_pb2_grpc.add_SpeechServicer_to_server(servicer, server)
        models_pb2_grpc.add_ModelsServicer_to_server(servicer, server)
        video = scripted_video.ScriptedVideo(scripted_video.Script(drop_at={0: 40}))
        video_pb2_grpc.add_VideoServicer_to_server(video, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = call(start())
    yield f"127.0.0.1:{port}"
    call(server.stop(None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_one_thread_sends_while_another_reads_over_a_broken_connection(address: str) -> None:
    samples = np.arange(8000, dtype=np.int16)
    retry = rt.RetryPolicy(initial_seconds=0.01)
    with sync.connect(address) as client, client.speech(retry=retry) as stream:

        def speak() -> None:
            for start in range(0, len(samples), 160):
                stream.send(samples[start : start + 160])
            assert stream.set_lookahead(bias=1.0).applied(30).position == len(samples)
            assert stream.checkpoint(30).position == len(samples)
            stream.finish()

        speaker = threading.Thread(target=speak)
        speaker.start()
        finals = [result.text for result in stream if isinstance(result, rt.Final)]
        speaker.join()
        assert stream.reconnects == 1
    assert finals == [checksum(samples[i : i + UTTERANCE].tobytes()) for i in range(0, 8000, UTTERANCE)]


def test_errors_are_raised_in_the_callers_thread(address: str) -> None:
    with sync.connect(address) as client:
        with pytest.raises(rt.InvalidRequest, match="sample_rate_hz"), client.speech(sample_rate=1):
            pass
        assert client.models()[0].name == "scripted"
        with pytest.raises(rt.NotFound):
            client.describe("other")
    client.close()
    with pytest.raises(rt.StreamClosed):
        client.models()


def test_a_stream_that_is_interrupted_while_it_opens_is_dropped() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            sync.connect(f"127.0.0.1:{silent.getsockname()[1]}") as client,
        ):
            stream = client.speech()
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Interrupted), stream:
                pass
            pump = stream._session._pump_task
            assert pump is not None
            client._loop.wait(asyncio.wait_for(asyncio.wait({pump}), 20))
            assert pump.done()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_one_thread_changes_prompts_while_another_takes_frames(address: str) -> None:
    retry = rt.RetryPolicy(initial_seconds=0.01)
    with (
        sync.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=1, buffer_seconds=None, retry=retry) as stream,
    ):
        places: list[int] = []

        def direct() -> None:
            stream.grant(20)
            control = stream.set_prompt("b", at_frame=12)
            stream.grant(60)
            places.append(control.applied(30).position)
            stream.resume().applied(30)
            stream.finish()

        director = threading.Thread(target=direct)
        director.start()
        frames = [event.data for event in stream if isinstance(event, rt.Frames)]
        director.join()
        assert (stream.reconnects, stream.position, stream.received) == (1, 60, 60)
        assert stream.info.seed == 1
    history = [(0, "a"), (places[0], "b")]
    assert frames == [
        scripted_video.frame_of(index, 1, *(change for change in history if change[0] <= index))
        for index in range(60)
    ]
