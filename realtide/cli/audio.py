"""Audio for `realtide transcribe`: files, standard input and the microphone, as mono blocks (ours)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import io
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from realtide.cli.errors import CommandError, UsageError

Samples = npt.NDArray[np.int16] | npt.NDArray[np.float32]
RAW_FORMATS: dict[str, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True, slots=True)
class Source:
    """Audio to be sent.

    Attributes:
        sample_rate: Samples per second.
        blocks: Mono samples of shape [n].
        seconds: Length; None if it is not known.
        live: True if blocks are known to come as they are spoken.
        channels: Channels before they were averaged to one.
    """

    sample_rate: int
    blocks: AsyncIterator[Samples]
    seconds: float | None
    live: bool
    channels: int = 1


def from_file(path: Path, block_seconds: float) -> Source:
    """A file in any format of libsndfile: WAV, FLAC, OGG, MP3, AIFF and more.

    Raises:
        CommandError: It does not exist, cannot be read, or is in no known format.
    """
    if not path.exists():
        raise CommandError(f"there is no file {path}")
    if path.is_dir():
        raise CommandError(f"{path} is a directory, not an audio file")
    return _from_soundfile(str(path), str(path), block_seconds)


def from_stream(stream: BinaryIO, block_seconds: float, raw_format: str, raw_rate: int) -> Source:
    """Standard input: WAV while it is written, other formats once they are complete, else raw mono samples.

    Args:
        stream: Unbuffered bytes: a read gives what is there.
        block_seconds: Length of the blocks.
        raw_format: Key of RAW_FORMATS, if the bytes have no header.
        raw_rate: Samples per second, if the bytes have no header.

    Raises:
        CommandError: The header is damaged or describes nothing that can be read.
    """
    head = _read_exactly(stream, 12)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _from_wav(stream, head, block_seconds)
    if head[:4] in (b"fLaC", b"OggS", b"FORM", b"RF64") or head[:3] == b"ID3":
        return _from_soundfile(io.BytesIO(head + stream.read()), "standard input", block_seconds)
    dtype = RAW_FORMATS[raw_format]
    blocks = _raw_blocks(stream, head, dtype, 1, max(1, round(raw_rate * block_seconds)))
    return Source(raw_rate, _in_thread(blocks), None, live=False)


def from_microphone(block_seconds: float, device: str | None = None) -> Source:
    """The default or named input device, at its own rate if that is from 8 to 48 kHz, else at 48 kHz.

    Raises:
        CommandError: The extra `mic` is not installed, or there is no such device.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the PortAudio library is missing
        raise CommandError(f"--mic needs PortAudio and `pip install realtide[mic]` ({error})") from None
    try:
        details = sounddevice.query_devices(device, "input")
        rate = int(details["default_samplerate"])
        rate = rate if 8000 <= rate <= 48000 else 48000
    except (ValueError, sounddevice.PortAudioError) as error:
        raise CommandError(f"there is no microphone to record from ({error})") from None

    async def blocks() -> AsyncIterator[Samples]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[npt.NDArray[np.float32]] = asyncio.Queue()

        def on_audio(data: npt.NDArray[np.float32], frames: int, time: Any, status: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, data[:, 0].copy())

        with sounddevice.InputStream(
            samplerate=rate,
            device=device,
            channels=1,
            dtype="float32",
            blocksize=max(1, round(rate * block_seconds)),
            callback=on_audio,
        ):
            while True:
                yield await queue.get()

    return Source(rate, blocks(), None, live=True)


def _from_soundfile(file: str | BinaryIO, name: str, block_seconds: float) -> Source:
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        known = "WAV, FLAC, OGG, MP3 and AIFF are among the known formats"
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise CommandError(f"{name} cannot be read as audio ({reason}); {known}") from None
    # 16-bit samples stay what they are; anything else becomes float.
    dtype = "int16" if sound.subtype == "PCM_16" else "float32"
    size = max(1, round(sound.samplerate * block_seconds))

    def blocks() -> Iterator[Samples]:
        with sound:
            while True:
                try:
                    data = sound.read(size, dtype=dtype, always_2d=True)
                except soundfile.LibsndfileError as error:
                    raise CommandError(f"{name} is damaged: {error.error_string}") from None
                if not len(data):
                    return
                yield mono(data)

    seconds = sound.frames / sound.samplerate if sound.frames < 1 << 62 else None
    return Source(sound.samplerate, _at_once(blocks()), seconds, live=False, channels=sound.channels)


def _from_wav(stream: BinaryIO, head: bytes, block_seconds: float) -> Source:
    consumed = bytearray(head)
    layout: tuple[int, int, int, int] | None = None  # kind, channels, rate, bits
    while True:
        chunk = _read_exactly(stream, 8)
        consumed += chunk
        if len(chunk) < 8:
            raise CommandError("standard input is a WAV file without samples")
        name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        if name == b"data":
            break
        body = _read_exactly(stream, size + size % 2)
        consumed += body
        if name == b"fmt " and len(body) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            if kind == _EXTENSIBLE and len(body) >= 26:
                kind = struct.unpack_from("<H", body, 24)[0]
            layout = (kind, channels, rate, bits)
    if layout is None or not layout[1] or not layout[2]:
        raise CommandError("standard input is a WAV file with a damaged header")
    kind, channels, rate, bits = layout
    dtype = {(_PCM, 16): RAW_FORMATS["s16le"], (_FLOAT, 32): RAW_FORMATS["f32le"]}.get((kind, bits))
    if dtype is None:  # rarer layouts are left to libsndfile, which needs the whole file
        whole = io.BytesIO(bytes(consumed) + stream.read())
        return _from_soundfile(whole, "standard input", block_seconds)
    # Programs that write to a pipe do not know the length and put 0 or the largest number.
    length = None if size in (0, 0xFFFFFFFF, 0x7FFFFFFF) or size > 0xFFFFF000 else size
    blocks = _raw_blocks(stream, b"", dtype, channels, max(1, round(rate * block_seconds)), length)
    return Source(rate, _in_thread(blocks), None, live=False, channels=channels)


def _raw_blocks(
    stream: BinaryIO, head: bytes, dtype: np.dtype[Any], channels: int, size: int, length: int | None = None
) -> Iterator[Samples]:
    width = dtype.itemsize * channels
    pending = head
    left = length
    any_whole = False
    while True:
        wanted = size * width - len(pending)
        if left is not None:
            wanted = min(wanted, left)
        data = stream.read(wanted)
        if left is not None:
            left -= len(data)
        pending += data
        ended = not data
        if len(pending) >= size * width or (ended and pending):
            whole = len(pending) // width * width
            if not whole:
                if any_whole:
                    return  # a pipe that was cut within a sample
                raise CommandError(f"standard input has only {len(pending)} bytes, which are not a sample")
            any_whole = True
            block = np.frombuffer(pending[:whole], dtype).reshape(-1, channels)
            pending = pending[whole:]
            yield mono(block.astype(dtype.newbyteorder("=")))
        elif ended:
            return


def mono(data: npt.NDArray[Any]) -> Samples:
    """Average the channels of [n, channels] int16 or float32 samples to [n] of the same type."""
    if data.shape[1] == 1:
        single: Samples = np.ascontiguousarray(data[:, 0])
        return single
    mean = data.astype(np.float32).mean(axis=1)
    mixed: Samples = np.rint(mean).astype(np.int16) if data.dtype == np.int16 else mean
    return mixed


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes: fewer only at the end."""
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


async def _at_once(blocks: Iterator[Samples]) -> AsyncIterator[Samples]:
    for block in blocks:
        yield block


async def _in_thread(blocks: Iterator[Samples]) -> AsyncIterator[Samples]:
    """Iterate in a thread, because reading a pipe waits; a daemon, because a pipe may stay open."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Samples | Exception | None] = asyncio.Queue(maxsize=8)

    def put(item: Samples | Exception | None) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(item), loop).result()

    def read() -> None:
        with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):  # the loop has ended
            try:
                for block in blocks:
                    put(block)
                put(None)
            except CommandError as error:
                put(error)

    threading.Thread(target=read, name="realtide-input", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def check_raw_format(name: str) -> str:
    """Accept a key of RAW_FORMATS. Raises UsageError."""
    if name not in RAW_FORMATS:
        raise UsageError(f"--format must be one of {', '.join(RAW_FORMATS)}, not {name!r}")
    return name
