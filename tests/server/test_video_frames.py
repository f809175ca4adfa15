"""Encoders of frames: a decoder gets back what went in, frame by frame and at the right times."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from realtide.engines.longlive.types import Frames8
from realtide.server.frames import Encoded, FragmentedMp4, Jpeg, RawRgb


def clip(count: int, width: int, height: int, first: int = 0) -> Frames8:
    """Frames [count, height, width, 3] of soft colours that move."""
    index = np.arange(first, first + count)[:, None, None]
    y, x = np.mgrid[:height, :width][:, None]
    waves = [
        128 + 90 * np.sin((x * a + y * b) / 40 + index / c) for a, b, c in ((1, 2, 9), (2, 1, 7), (1, 1, 5))
    ]
    return np.stack(waves, -1).astype(np.uint8)


def psnr(found: Any, wanted: Frames8) -> float:
    error = np.mean((np.asarray(found, np.float64) - wanted) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def boxes(data: bytes) -> list[str]:
    """Types of the top-level boxes; they fill `data` exactly."""
    found, offset = [], 0
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        found.append(kind.decode())
        offset += size
    assert offset == len(data)
    return found


def encoded(encoder: FragmentedMp4, frames: Frames8, sizes: Any, first: int = 0) -> list[Encoded]:
    """Encode `frames` in calls of the sizes given, over and over."""
    parts, start, size = [], 0, itertools.cycle(sizes)
    while start < len(frames):
        count = next(size)
        parts.append(encoder(first + start, frames[start : start + count]))
        start += count
    return parts


def whole(parts: list[Encoded]) -> bytes:
    return b"".join(part.initialization + part.data for part in parts)


def decoded(data: bytes) -> tuple[list[Any], list[Fraction]]:
    """Frames as arrays and their times in seconds."""
    with av.open(io.BytesIO(data), "r") as container:
        (stream,) = container.streams
        assert isinstance(stream, av.VideoStream)
        frames = list(container.decode(stream))
    times = [frame.pts * frame.time_base for frame in frames if frame.pts is not None and frame.time_base]
    return [frame.to_ndarray(format="rgb24") for frame in frames], times


def test_raw_frames_are_their_bytes() -> None:
    frames = clip(1, 7, 5)[:, ::-1]  # not in one piece
    assert RawRgb()(3, frames) == Encoded(np.ascontiguousarray(frames).tobytes())


@pytest.mark.parametrize(("width", "height"), [(64, 64), (33, 17)])
def test_jpeg_follows_its_quality(width: int, height: int) -> None:
    frames = clip(1, width, height)
    sizes, ratios = [], []
    for quality in (1, 50, 90, 100):
        data = Jpeg(quality)(0, frames).data
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG"
        sizes.append(len(data))
        ratios.append(psnr(image.convert("RGB"), frames[0]))
    assert sizes == sorted(sizes)
    assert ratios == sorted(ratios)
    assert ratios[2] > 38


@pytest.mark.parametrize("rate", [16, 24, 29.97, 12.5, 0.5])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (98, 34), (63, 65)])
def test_fragments_are_a_film(width: int, height: int, rate: float) -> None:
    frames = clip(40, width, height)
    encoder = FragmentedMp4(width, height, rate, 12)
    parts = encoded(encoder, frames, (1, 3, encoder.group))
    encoder.close()
    assert boxes(parts[0].initialization) == ["ftyp", "moov"]
    assert [part.initialization for part in parts[1:]] == [b""] * (len(parts) - 1)
    assert all(boxes(part.data) == ["moof", "mdat"] for part in parts)
    found, times = decoded(whole(parts))
    exact = Fraction(rate).limit_denominator(1001)
    assert times == [index / exact for index in range(40)]
    for picture, frame in zip(found, frames, strict=True):
        # The picture of an odd size has one more column or row, a copy.
        assert picture.shape == (height + height % 2, width + width % 2, 3)
        assert psnr(picture[:height, :width], frame) > 36


def test_nothing_is_held_back() -> None:
    """After every call, what there is so far can be played to its last frame."""
    encoder = FragmentedMp4(64, 48, 16, 20)
    frames = clip(9, 64, 48)
    data = b""
    for index in range(9):
        part = encoder(index, frames[index : index + 1])
        data += part.initialization + part.data
        found, _ = decoded(data)
        assert len(found) == index + 1
        assert psnr(found[-1], frames[index]) > 30
    encoder.close()


def test_fragments_are_numbered_upwards_across_a_resume() -> None:
    numbers = []
    for start in (0, 8):
        encoder = FragmentedMp4(64, 48, 16, 20)
        for part in encoded(encoder, clip(8, 64, 48, start), (3, 1), start):
            (number,) = struct.unpack_from(">I", part.data, part.data.index(b"mfhd") + 8)
            numbers.append(number)
        encoder.close()
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("start", [1000, 10**9, 2**31 - 6])
def test_a_resumed_film_goes_on_at_its_time(start: int) -> None:
    """Another encoder, from a frame in the middle: its first frame needs none before, times go on."""
    frames = clip(12, 64, 48, start)
    encoder = FragmentedMp4(64, 48, 16, 20)
    found, times = decoded(whole(encoded(encoder, frames, (4,), start)))
    encoder.close()
    assert times == [Fraction(start + index, 16) for index in range(12)]
    assert all(psnr(picture, frame) > 30 for picture, frame in zip(found, frames, strict=True))


def test_a_player_can_start_every_two_seconds() -> None:
    encoder = FragmentedMp4(64, 48, 16, 20)
    data = whole(encoded(encoder, clip(100, 64, 48), (4,)))
    encoder.close()
    with av.open(io.BytesIO(data), "r") as container:
        keys = [packet.pts for packet in container.demux() if packet.is_keyframe and packet.pts is not None]
        second = 1 / container.streams[0].time_base  # type: ignore[operator]
    assert keys[0] == 0
    assert max(np.diff([*keys, 100 / 16 * second])) <= 2 * second


def test_the_rate_factor_is_obeyed() -> None:
    frames = clip(8, 64, 48)
    sizes = []
    for crf in (0, 20, 51):
        encoder = FragmentedMp4(64, 48, 16, crf)
        sizes.append(len(whole(encoded(encoder, frames, (4,)))))
        encoder.close()
    assert sizes[0] > sizes[1] > sizes[2]


def test_colours_are_declared() -> None:
    encoder = FragmentedMp4(64, 48, 16, 20)
    data = whole(encoded(encoder, clip(1, 64, 48), (1,)))
    encoder.close()
    with av.open(io.BytesIO(data), "r") as container:
        codec = container.streams.video[0].codec_context
        assert (codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)


def test_fragments_are_short() -> None:
    assert FragmentedMp4(64, 64, 16, 20).group == 4
    assert FragmentedMp4(64, 64, 1, 20).group == 1


def test_closed_encoders_give_nothing_and_stay_closed() -> None:
    for encoder in (FragmentedMp4(64, 48, 16, 20), FragmentedMp4(64, 48, 16, 20)):
        encoder(0, clip(1, 64, 48))
        encoder.close()
        encoder.close()
        assert encoder(1, clip(1, 64, 48)) == Encoded(b"")
    never = FragmentedMp4(64, 48, 16, 20)
    never.close()
    assert never(0, clip(1, 64, 48)) == Encoded(b"")
    for plain in (RawRgb(), Jpeg(50)):
        plain.close()


def test_closing_under_a_call_waits_for_nobody_and_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FragmentedMp4(64, 48, 16, 20)
    encoder(0, clip(1, 64, 48))
    inside, go = threading.Event(), threading.Event()
    encode = encoder._encode

    def held(first: int, frames: Frames8) -> Encoded:
        inside.set()
        assert go.wait(10)
        return encode(first, frames)

    monkeypatch.setattr(encoder, "_encode", held)
    results: list[Encoded] = []
    thread = threading.Thread(target=lambda: results.append(encoder(1, clip(1, 64, 48))))
    thread.start()
    assert inside.wait(10)
    encoder.close()  # returns though the call holds the encoder
    assert encoder._opened is not None
    go.set()
    thread.join()
    assert boxes(results[0].data) == ["moof", "mdat"]
    assert encoder._opened is None


def test_libraries_are_imported_when_needed() -> None:
    code = (
        "import sys, numpy\n"
        "from realtide.server.frames import FragmentedMp4, Jpeg\n"
        "FragmentedMp4(64, 64, 16, 20)\n"
        "assert not {'av', 'PIL'} & set(sys.modules)\n"
        "Jpeg(50)(0, numpy.zeros((1, 8, 8, 3), numpy.uint8))\n"
        "assert 'PIL' in sys.modules and 'av' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
