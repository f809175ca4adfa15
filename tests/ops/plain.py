"""A client without the library, as somebody would write it in any language: one call, never tried again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from realtide_client.v1 import common_pb2, speech_pb2, speech_pb2_grpc

Request = speech_pb2.SpeechStreamRequest
_BLOCK = 0.1


async def speaks_plainly(
    address: str,
    samples: Any,
    rate: int,
    *,
    leaves: bool = False,
    options: Sequence[tuple[str, int]] = (),
) -> tuple[list[str], str]:
    """Say `samples` at the speed at which they were spoken.

    Args:
        address: of the server.
        samples: float32.
        rate: of `samples`, in Hz.
        leaves: ends its input when it hears `going_away`; else it talks on.
        options: of the channel.

    Returns:
        The kinds of the messages that it was sent, and the name of the call's status.
    """
    return await asyncio.to_thread(_speak, address, samples, rate, leaves, options)


def _speak(
    address: str, samples: Any, rate: int, leaves: bool, options: Sequence[tuple[str, int]]
) -> tuple[list[str], str]:
    kinds: list[str] = []
    ended = threading.Event()

    def requests() -> Iterator[speech_pb2.SpeechStreamRequest]:
        form = speech_pb2.AudioFormat(encoding=speech_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hz=rate)
        yield Request(open=speech_pb2.SpeechOpen(audio=form))
        size = round(_BLOCK * rate)
        for start in range(0, len(samples), size):
            if ended.is_set() or (leaves and "going_away" in kinds):
                break
            yield Request(audio=speech_pb2.AudioChunk(data=samples[start : start + size].tobytes()))
            ended.wait(_BLOCK)
        yield Request(finish=common_pb2.Finish())

    # Not grpc.aio: where a write and the end of the call meet, that one says INTERNAL, whatever status the
    # server has sent (grpc/grpc#36066).
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *options]) as channel:
        call: Any = speech_pb2_grpc.SpeechStub(channel).Stream(requests())
        with contextlib.suppress(grpc.RpcError):
            for response in call:
                kinds.append(response.WhichOneof("message"))
        ended.set()
        return kinds, call.code().name
