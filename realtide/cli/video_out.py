"""Where frames go: a file that plays, a pipe, images, raw pixels (ours)."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from realtide.cli.errors import CommandError, UsageError
from realtide_client import Frames, VideoEncoding, VideoInfo

_FORMS = ".mp4, .y4m, .rgb, a directory or pattern (f-%05d.jpg) for JPEG images, or - for a pipe"
_PATTERN = re.compile(r"%0?\d*d")


class Sink(Protocol):
    """Takes a session's frames."""

    @property
    def encoding(self) -> VideoEncoding:
        """How frames have to come."""
        ...

    def open(self, info: VideoInfo) -> None:
        """The session is open. Raises CommandError."""
        ...

    def write(self, frames: Frames) -> None:
        """Take frames. Raises CommandError."""
        ...

    def close(self) -> list[str]:
        """No more frames; the names of what was written. Idempotent."""
        ...


def sink_for(out: str | None, raw: bool) -> Sink:
    """The sink that `--out` names.

    Args:
        out: A path; "-" for standard output; None: nothing is kept.
        raw: Frames come as pixels (they are shown too), and the sink encodes them.

    Raises:
        UsageError: There is no such form, or its directory is missing.
    """
    if out is None:
        return Nothing("raw_rgb" if raw else "h264")
    if out == "-":
        return Mp4(None, raw)
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        path = path / "%06d.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {path.parent}")
    match path.suffix.lower():
        case ".mp4":
            return Mp4(path, raw)
        case ".jpg" | ".jpeg":
            if not _PATTERN.search(path.name):
                raise UsageError(
                    f"--out {out}: images need a pattern, {path.stem}-%05d{path.suffix}, or a directory"
                )
            return Images(path, raw)
        case ".rgb" | ".y4m":
            return Pixels(path)
    raise UsageError(f"--out {out}: must be {_FORMS}")


class Nothing:
    """Keeps nothing."""

    def __init__(self, encoding: VideoEncoding) -> None:
        self.encoding: VideoEncoding = encoding

    def open(self, info: VideoInfo) -> None:
        """Nothing to do."""

    def write(self, frames: Frames) -> None:
        """Drop them."""

    def close(self) -> list[str]:
        """Nothing was written."""
        return []


class Mp4:
    """Fragmented MP4 as it comes, complete after every fragment; or encoded here from pixels.

    If a server that took the session over writes another initialization segment, a second file begins,
    NAME-2.
    """

    def __init__(self, path: Path | None, raw: bool) -> None:
        self.encoding: VideoEncoding = "raw_rgb" if raw else "h264"
        self._path = path
        self._file: IO[bytes] | None = None
        self._written: list[str] = []
        self._encoder: _Encoder | None = None

    def open(self, info: VideoInfo) -> None:
        """Make the file."""
        self._begin()
        if self.encoding == "raw_rgb":
            from realtide.server.frames import FragmentedMp4

            self._encoder = FragmentedMp4(info.width, info.height, info.frames_per_second, 20)

    def write(self, frames: Frames) -> None:
        """Append a fragment."""
        if self._encoder is not None:
            encoded = self._encoder(frames.position, frames.rgb)
            data = encoded.initialization + encoded.data
        else:
            if (
                frames.initialization
                and frames.position
                and self._file is not None
                and self._path is not None
            ):
                self._begin()
            data = frames.payload
        with _writing(self._path):
            if self._file is not None:
                self._file.write(data)
                self._file.flush()

    def close(self) -> list[str]:
        """Close the file."""
        if self._encoder is not None:
            self._encoder.close()
        if self._file is not None and self._path is not None:
            self._file.close()
        self._file = None
        return self._written

    def _begin(self) -> None:
        if self._path is None:
            self._file = sys.stdout.buffer
            return
        if self._file is not None:
            self._file.close()
        number = len(self._written) + 1
        path = self._path if number == 1 else self._path.with_stem(f"{self._path.stem}-{number}")
        with _writing(path):
            self._file = path.open("wb")
        self._written.append(str(path))


class _Encoder(Protocol):
    """`realtide.server.frames.FrameEncoder`, without importing it."""

    def __call__(self, first: int, frames: npt.NDArray[np.uint8]) -> _Encoded: ...

    def close(self) -> None: ...


class _Encoded(Protocol):
    @property
    def data(self) -> bytes: ...

    @property
    def initialization(self) -> bytes: ...


class Images:
    """A JPEG file a frame; the number in its name is the frame's."""

    def __init__(self, pattern: Path, raw: bool) -> None:
        self.encoding: VideoEncoding = "raw_rgb" if raw else "jpeg"
        self._pattern = pattern
        self._count = 0

    def open(self, info: VideoInfo) -> None:
        """Nothing to do."""

    def write(self, frames: Frames) -> None:
        """Write the file."""
        data = frames.data
        if self.encoding == "raw_rgb":
            from realtide.server.frames import Jpeg

            data = Jpeg(90)(frames.position, frames.rgb).data
        path = self._pattern.with_name(self._pattern.name % frames.position)
        with _writing(path):
            path.write_bytes(data)
        self._count += 1

    def close(self) -> list[str]:
        """The pattern, if there is any image."""
        return [str(self._pattern)] if self._count else []


class Pixels:
    """Raw RGB (.rgb), or uncompressed 4:4:4 with a header that players understand (.y4m)."""

    encoding: VideoEncoding = "raw_rgb"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._y4m = path.suffix.lower() == ".y4m"

    def open(self, info: VideoInfo) -> None:
        """Make the file."""
        with _writing(self._path):
            self._file = self._path.open("wb")
            if self._y4m:
                from fractions import Fraction

                rate = Fraction(info.frames_per_second).limit_denominator(1001)
                header = f"YUV4MPEG2 W{info.width} H{info.height} F{rate.numerator}:{rate.denominator}"
                self._file.write(f"{header} Ip A1:1 C444\n".encode())

    def write(self, frames: Frames) -> None:
        """Append the frames."""
        with _writing(self._path):
            if self._file is not None:
                for frame in frames.rgb:
                    self._file.write(b"FRAME\n" + yuv444(frame).tobytes() if self._y4m else frame.tobytes())

    def close(self) -> list[str]:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        return [str(self._path)]


# BT.601 with 8 bits, luma 16 to 235: what Y4M means if nothing else is said.
_YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_YUV_OFFSET = np.array([16.0, 128.0, 128.0])


def yuv444(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Planes [3, height, width] of Y, Cb, Cr (ITU-R BT.601) of an RGB frame [height, width, 3]."""
    planes = np.rint(frame @ _YUV.T + _YUV_OFFSET).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(planes.transpose(2, 0, 1))


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"{path or 'standard output'} cannot be written: {error.strerror}") from None
