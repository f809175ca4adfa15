"""Frames of video to bytes: raw RGB, JPEG, H.264 in fragmented MP4 (ISO/IEC 14496-12; ours).

A session has one encoder. The engine calls it, in the thread that decodes, for consecutive frames; it holds
nothing back: what goes in comes out of the same call. The libraries are imported with the first frame that
needs them, so a server without such sessions does without.
"""

from __future__ import annotations

import io
import threading
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

from realtide.engines.longlive.types import Frames8

# Seconds between frames that a player can start from.
_KEY_SECONDS = 2.0
# Longest fragment in seconds: how long its first frame may wait for its last one.
_FRAGMENT_SECONDS = 0.25
# Playback rates are taken as fractions with at most this denominator; 1001 is that of NTSC.
_DENOMINATOR = 1001
# Complete at once, without tables at the end of the file; a fragment ends where it is told to.
_MOVFLAGS = "empty_moov+default_base_moof+skip_trailer+frag_custom"


class Encoded(NamedTuple):
    """Bytes of a call's frames; `initialization` comes before them and is empty but for the first call."""

    data: bytes
    initialization: bytes = b""


class FrameEncoder(Protocol):
    """Turns consecutive frames into bytes."""

    @property
    def group(self) -> int:
        """Most frames of one call."""
        ...

    def __call__(self, first: int, frames: Frames8) -> Encoded:
        """Encode frames [1..group, height, width, 3] of RGB, the first of which has index `first`.

        After `close` the result is empty.
        """
        ...

    def start_at(self, index: int) -> None:
        """Make the frame with this index, which is still to come, one that a player can start from."""
        ...

    def close(self) -> None:
        """Free what the encoder holds; from any thread, any number of times, without waiting for a call."""
        ...


class RawRgb:
    """The frames as they are."""

    group = 1

    def __call__(self, first: int, frames: Frames8) -> Encoded:
        """3 * width * height bytes a frame."""
        return Encoded(frames.tobytes())

    def start_at(self, index: int) -> None:
        """Every frame is one."""

    def close(self) -> None:
        """Nothing is held."""


class Jpeg:
    """An image a frame.

    Args:
        quality: 1 to 100, as the JPEG library scales its tables. From 90 on colour has full resolution.
    """

    group = 1

    def __init__(self, quality: int) -> None:
        self._quality = quality

    def __call__(self, first: int, frames: Frames8) -> Encoded:
        """One JPEG file."""
        from PIL import Image

        written = io.BytesIO()
        subsampling = "4:4:4" if self._quality >= 90 else "4:2:0"
        Image.fromarray(frames[0]).save(written, "JPEG", quality=self._quality, subsampling=subsampling)
        return Encoded(written.getvalue())

    def start_at(self, index: int) -> None:
        """Every frame is one."""

    def close(self) -> None:
        """Nothing is held."""


class FragmentedMp4:
    """H.264 without reordering or delay, a fragment (`moof`, `mdat`) a call, in BT.709 and 4:2:0.

    The first frame is one that a player can start from, as is one every two seconds, and the one that
    `start_at` names. Times follow from the frames' indices. A width or height that is odd grows by a copy of
    the last column or row: 4:2:0 has no other.

    Args:
        width: in pixels.
        height: in pixels.
        frames_per_second: sets the times.
        crf: x264's constant rate factor, 0 (lossless) to 51.
    """

    def __init__(self, width: int, height: int, frames_per_second: float, crf: int) -> None:
        rate = Fraction(frames_per_second).limit_denominator(_DENOMINATOR)
        # Slower than one frame in 1001 seconds is no rate of a video, but must not become 0.
        self._rate = rate or Fraction(1, _DENOMINATOR)
        self._width, self._height = width, height
        self._crf = crf
        self.group = max(round(_FRAGMENT_SECONDS * frames_per_second), 1)
        self._opened: _H264 | None = None
        self._start = -1
        self._closed = False
        # Held by a call and tried by `close`: who of them comes last frees.
        self._busy = threading.Lock()

    def __call__(self, first: int, frames: Frames8) -> Encoded:
        """One fragment; with the first one the initialization segment (`ftyp`, `moov`)."""
        with self._busy:
            encoded = Encoded(b"") if self._closed else self._encode(first, frames)
        if self._closed:
            self.close()
        return encoded

    def start_at(self, index: int) -> None:
        """Encode the frame without reference to those before it; the last index said counts."""
        self._start = index

    def close(self) -> None:
        """Free the encoder; if a call is under way, its end does."""
        self._closed = True
        if self._busy.acquire(blocking=False):
            try:
                opened, self._opened = self._opened, None
                if opened is not None:
                    opened.close()
            finally:
                self._busy.release()

    def _encode(self, first: int, frames: Frames8) -> Encoded:
        initialization = b""
        if self._opened is None:
            self._opened = _H264(self._width, self._height, self._rate, self._crf)
            initialization = self._opened.initialization
        packets = [
            packet
            for index, frame in enumerate(frames)
            for packet in self._opened.packets(first + index, frame, first + index == self._start)
        ]
        if len(packets) != len(frames):
            raise RuntimeError(f"x264 gave {len(packets)} packets for {len(frames)} frames")
        return Encoded(self._opened.fragment(first, packets), initialization)


class _H264:
    """The encoder, and the writer of fragments; `close` ends both."""

    def __init__(self, width: int, height: int, rate: Fraction, crf: int) -> None:
        import av
        from av.video.frame import PictureType
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

        self._av, self._intra = av, PictureType.I
        self._time_base = 1 / rate
        self._edges = ((0, height % 2), (0, width % 2), (0, 0))
        self._reformatter = VideoReformatter()
        self._colours: dict[str, Any] = {
            "format": "yuv420p",
            "dst_colorspace": Colorspace.ITU709,
            "dst_color_range": ColorRange.MPEG,
        }
        header = io.BytesIO()
        self._container = av.open(header, "w", format="mp4", options={"movflags": _MOVFLAGS})
        # The tune takes away reordering and look-ahead: each frame comes out at once.
        options = {"preset": "veryfast", "tune": "zerolatency", "crf": str(crf)}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = self._time_base
        codec.thread_count = 1  # the other cores denoise
        codec.gop_size = max(round(_KEY_SECONDS * rate), 1)
        codec.max_b_frames = 0
        codec.color_range, codec.colorspace = ColorRange.MPEG, Colorspace.ITU709
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._container.start_encoding()
        self.initialization = header.getvalue()

    def packets(self, index: int, frame: Frames8, start: bool) -> list[Any]:
        """Encode frame [height, width, 3] with its index; `start`: a player can start from it."""
        padded = np.pad(frame, self._edges, "edge") if any(after for _, after in self._edges) else frame
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        picture = self._reformatter.reformat(picture, **self._colours)
        picture.pts, picture.time_base = index, self._time_base
        if start:
            picture.pict_type = self._intra  # x264 makes an IDR frame of it: its groups are closed
        packets = self._stream.encode(picture)
        for packet in packets:
            packet.duration = 1  # or the last one of a fragment has none
        return packets

    def fragment(self, first: int, packets: list[Any]) -> bytes:
        """Write the packets of frames from `first` on.

        A muxer ends a fragment when the next one begins, which would hold it back by one. So each gets a
        muxer of its own, told that it goes on in the middle of a file; the header that it writes is dropped.
        """
        written = io.BytesIO()
        options = {
            "movflags": _MOVFLAGS + "+frag_discont",
            # Numbers only have to rise; those of frames do so across a resume too.
            "fragment_index": str(first % (1 << 31) + 1),
            "avoid_negative_ts": "disabled",  # or times would start from 0 again
        }
        with self._av.open(written, "w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(self._stream)
            container.start_encoding()
            start = written.tell()
            for packet in packets:
                packet.stream = stream
                container.mux_one(packet)
        return written.getvalue()[start:]

    def close(self) -> None:
        """Free the encoder."""
        self._container.close()
