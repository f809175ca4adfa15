"""Streaming front end: audio at the client's rate in, encoder input windows out.

Source: ours, on soxr and `fbank`.

Everything happens in *units* of one encoder frame (four fbank frames, 40 ms). Unit `i` needs the model-rate
samples [640 i, 640 i + 880) and yields fbank frames 4 i .. 4 i + 3, so its cost and its result do not depend
on how the audio was cut into chunks: features are bit-identical for every chunking.

soxr's own streaming mode works in FFT blocks and holds back up to 118 ms at 8 kHz. Here each unit's new
samples are resampled one-shot from a fixed window of input with `resample_context_ms` on either side, whose
start is aligned so that the phases of both rates agree. That adds a constant delay of the context only,
differs from resampling the whole recording by less than 1e-5, and makes the resampler stateless: a restored
stream continues exactly.

At the end of the audio the rule is: every 40 ms frame that was started is completed with zero samples. `n`
model-rate samples give ceil(n / 640) encoder frames. The log-mel values are floored at `log_floor`, so that
digital silence and the empty bands of upsampled telephone audio look like a very quiet room, not like an
outlier.

An fbank frame is computed from its own 400 samples only. So the units of all streams of a step are one array,
and a few operations on it let the interpreter's lock go a few times, where calls for each stream would have
to win it back as often from the threads that serve. Copies of single chunks are made by means that keep the
lock, for the same reason.

The module knows nothing of the encoder but its window shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from realtide.engines.ancat.fbank import Fbank

Float32 = npt.NDArray[np.float32]

MIN_SAMPLE_RATE = 8000
MAX_SAMPLE_RATE = 48000


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """Parameters of the features, from the bundle's manifest."""

    sample_rate: int = 16000  # the model's rate, Hz
    mel_bins: int = 80
    low_freq: float = 20.0  # Hz
    high_freq: float = -400.0  # Hz; negative: relative to Nyquist
    frame_ms: int = 25
    shift_ms: int = 10
    subsampling: int = 4  # fbank frames per encoder frame
    left_context: int = 3  # fbank frames of the previous unit that a window starts with
    log_floor: float = 0.0  # least log-mel value, nats, audio in int16 units
    resample_context_ms: int = 10  # input that the resampler sees on either side of what it produces

    def __post_init__(self) -> None:
        if not 0 <= self.left_context <= self.subsampling:
            raise ValueError(f"left_context must be in 0..{self.subsampling}, got {self.left_context}")
        if self.frame_ms < self.shift_ms or self.shift_ms < 1:
            raise ValueError(f"need 1 <= shift_ms <= frame_ms, got {self.shift_ms} and {self.frame_ms}")

    @property
    def window(self) -> int:
        """Fbank frames in one encoder input window."""
        return self.left_context + self.subsampling

    @property
    def unit(self) -> int:
        """Model-rate samples per encoder frame."""
        return self.subsampling * self.shift_ms * self.sample_rate // 1000

    @property
    def shift(self) -> int:
        """Model-rate samples per fbank frame."""
        return self.shift_ms * self.sample_rate // 1000

    @property
    def overlap(self) -> int:
        """Model-rate samples that a unit needs beyond its own (the fbank window's overhang)."""
        return (self.frame_ms - self.shift_ms) * self.sample_rate // 1000


class Features:
    """What streams share: the filter banks and the normalisation. Keeps nothing of a stream.

    Raises ValueError if `mean` or `std` are not [mel_bins].
    """

    def __init__(
        self, config: FrontendConfig | None = None, *, mean: Float32 | None = None, std: Float32 | None = None
    ) -> None:
        c = self.config = config or FrontendConfig()
        self._mean = np.zeros(c.mel_bins, np.float32) if mean is None else np.asarray(mean, np.float32)
        self._scale = np.ones(c.mel_bins, np.float32) if std is None else 1 / np.asarray(std, np.float32)
        if self._mean.shape != (c.mel_bins,) or self._scale.shape != (c.mel_bins,):
            raise ValueError(f"mean and std must have shape [{c.mel_bins}]")
        self._row_offsets = np.arange(c.window)
        self._fbank = Fbank(
            c.sample_rate, c.mel_bins, c.low_freq, c.high_freq, c.shift + c.overlap, c.shift, c.subsampling
        )

    def windows(self, drawn: Sequence[Drawn]) -> Float32:
        """Normalised windows [n, window, mel_bins] of all streams' units, stream by stream.

        Every `Drawn` comes here once, and a stream's in their order.
        """
        c = self.config
        subsampling, left = c.subsampling, c.left_context
        drawn = [one for one in drawn if one.units]
        if not drawn:
            return np.empty((0, c.window, c.mel_bins), np.float32)
        rows = self._rows(drawn)
        np.maximum(rows, np.float32(c.log_floor), out=rows)
        rows -= self._mean
        rows *= self._scale
        # Each stream's rows behind the last ones of its unit before.
        parts: list[Float32] = []
        starts: list[int] = []
        first = place = 0
        for one in drawn:
            size = one.units * subsampling
            own = rows[first : first + size]
            parts += (one.frontend._last_rows, own)
            one.frontend._last_rows = own[size - left :].copy()
            starts += range(place, place + size, subsampling)
            first += size
            place += size + left
        joined = _joined(parts)
        if len(starts) == len(drawn):  # a unit of each stream, so one window lies behind the other already
            return joined.reshape(-1, c.window, c.mel_bins)
        windows: Float32 = joined.reshape(-1, c.mel_bins)[np.array(starts)[:, None] + self._row_offsets]
        return windows

    def _rows(self, drawn: Sequence[Drawn]) -> Float32:
        """Log-mel rows [subsampling * units, mel_bins] of all, not normalised."""
        c = self.config
        length = c.unit + c.overlap
        parts: list[memoryview] = []
        for one in drawn:
            if one.units == 1:
                parts += [part.data for part in one.audio]
            else:
                audio = _joined(one.audio).data
                parts += [audio[start : start + length] for start in range(0, one.units * c.unit, c.unit)]
        units = np.frombuffer(b"".join(parts), np.float32)
        return self._fbank.rows(units.reshape(-1, length))


@dataclass(slots=True)
class Drawn:
    """Units that a stream has handed to `Features.windows`: their model-rate samples, overlap first."""

    frontend: Frontend
    audio: list[Float32]
    units: int


class Frontend:
    """One stream's front end. `push` only buffers; features are computed in `take`.

    `features` are those that this stream shares with others; without, it has its own, with `mean` and `std`.

    Raises ValueError if `sample_rate` (Hz) is outside 8000..48000 or `mean`/`std` are not [mel_bins].
    """

    def __init__(
        self,
        sample_rate: int,
        config: FrontendConfig | None = None,
        *,
        mean: Float32 | None = None,
        std: Float32 | None = None,
        features: Features | None = None,
    ) -> None:
        self._features = features or Features(config, mean=mean, std=std)
        c = self._features.config
        if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
            raise ValueError(
                f"sample_rate must be in {MIN_SAMPLE_RATE}..{MAX_SAMPLE_RATE} Hz, got {sample_rate}"
            )
        self.config = c
        self.sample_rate = sample_rate
        divisor = gcd(sample_rate, c.sample_rate)
        self._in_step = (
            sample_rate // divisor
        )  # in_step input samples last as long as out_step model-rate samples
        self._out_step = c.sample_rate // divisor
        self._context = 0 if sample_rate == c.sample_rate else -(-c.resample_context_ms * sample_rate // 1000)
        self._overlapping, self._unit = c.overlap, c.unit  # model-rate samples; asked for at every chunk
        self._samples = _Fifo()  # input from the first sample that a later unit needs
        self._units = 0  # units (encoder frames) computed
        self._pushed = 0  # input samples, inserted silence included
        self._inserted = 0  # of those, silence
        self._audio_end = 0  # one past the client's last sample, in the same count as _pushed
        self._finished = False
        self._overlap = np.zeros(0, np.float32)  # the last model-rate samples that were drawn
        self._last_rows = np.zeros((c.left_context, c.mel_bins), np.float32)  # normalised

    @property
    def samples_pushed(self) -> int:
        """Samples of the client's audio so far (inserted silence not counted)."""
        return self._pushed - self._inserted

    @property
    def samples_inserted(self) -> int:
        """Samples of silence, at the input's rate, that `flush` and `finish` added so far."""
        return self._inserted

    @property
    def frames_taken(self) -> int:
        """Encoder frames handed out so far: the index of the next window."""
        return self._units

    @property
    def frames_ready(self) -> int:
        """Encoder input windows that `take` could return now."""
        usable = (self._pushed - self._context) * self._out_step // self._in_step - self._overlapping
        return max(0, usable // self._unit - self._units)

    @property
    def lookahead(self) -> float:
        """Seconds of audio after a frame's own 40 ms that must arrive before its window exists."""
        return self.config.overlap / self.config.sample_rate + self._context / self.sample_rate

    def push(self, samples: Float32) -> None:
        """Buffer mono samples [n] in [-1, 1] at the stream's rate. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("audio after finish")
        self._samples.append(samples)
        if len(samples):
            self._pushed += len(samples)
            self._audio_end = self._pushed

    def take(self, max_frames: int | None = None) -> Float32:
        """The next windows [n, window, mel_bins], normalised, n <= max_frames (None: all that are ready).

        Window i holds fbank frames 4 i - 3 .. 4 i + 3; frames before the stream are zeros after
        normalisation.
        """
        return self._features.windows([self.draw(max_frames)])

    def draw(self, max_frames: int | None = None) -> Drawn:
        """The samples of the next units, for `Features.windows`, before the next push; see `take`."""
        c = self.config
        ready = self.frames_ready
        n = ready if max_frames is None else min(ready, max_frames)
        if n <= 0:
            return Drawn(self, [], 0)
        audio = [self._overlap]
        if self.sample_rate == c.sample_rate:
            audio.append(self._next(n))
        else:
            for _ in range(n):
                unit, start = self._units, self._window_start(self._units)
                first = unit * c.unit + (c.overlap if unit else 0)
                offset = first - start // self._in_step * self._out_step
                length = (unit + 1) * c.unit + c.overlap - first
                resampled = soxr.resample(self._next(1), self.sample_rate, c.sample_rate, "HQ")
                audio.append(resampled[offset : offset + length])
        last = audio[-1]
        self._overlap = last[len(last) - self._overlapping :].copy()
        return Drawn(self, audio, n)

    def flush(self) -> int:
        """Complete the frame that was started with silence, so that all audio so far is in a window.

        The stream goes on after the silence. Returns the samples inserted (at the input's rate): from here on
        positions in the features are later than positions in the client's audio by that much.
        """
        c = self.config
        audio = -(-self._audio_end * self._out_step // self._in_step)
        units = -(-audio // c.unit)
        missing = self._window_end(units - 1) - self._pushed
        if units <= self._units or missing <= 0:
            return 0
        self._samples.append(np.zeros(missing, np.float32))
        self._pushed += missing
        self._inserted += missing
        return missing

    def finish(self) -> None:
        """No more audio: complete the last frame that was started. Idempotent."""
        if not self._finished:
            self.flush()
            self._finished = True

    def export(self) -> dict[str, Any]:
        """The whole state as integers, booleans and float32 arrays; the stream goes on unchanged."""
        return {
            "sample_rate": self.sample_rate,
            "units": self._units,
            "pushed": self._pushed,
            "inserted": self._inserted,
            "audio_end": self._audio_end,
            "finished": self._finished,
            "samples": self._samples.view().copy(),
            "overlap": self._overlap.copy(),
            "last_rows": self._last_rows.copy(),
        }

    @classmethod
    def restore(
        cls,
        state: dict[str, Any],
        config: FrontendConfig | None = None,
        *,
        mean: Float32 | None = None,
        std: Float32 | None = None,
        features: Features | None = None,
    ) -> Frontend:
        """Continue an exported stream, bit for bit. Raises ValueError if the state does not fit `config`."""
        self = cls(int(state["sample_rate"]), config, mean=mean, std=std, features=features)
        self._units, self._pushed = int(state["units"]), int(state["pushed"])
        self._inserted, self._finished = int(state["inserted"]), bool(state["finished"])
        self._audio_end = int(state["audio_end"])
        samples = np.asarray(state["samples"], np.float32)
        overlap = np.asarray(state["overlap"], np.float32)
        last_rows = np.asarray(state["last_rows"], np.float32)
        expected = self.config.overlap if self._units else 0
        if (
            samples.shape != (self._pushed - self._window_start(self._units),)
            or overlap.shape != (expected,)
            or last_rows.shape != self._last_rows.shape
            or not 0 <= self._inserted <= self._pushed
            or not 0 <= self._audio_end <= self._pushed
            or self._units < 0
        ):
            raise ValueError("front end state does not fit this configuration")
        self._samples.append(samples)
        self._overlap, self._last_rows = overlap.copy(), last_rows.copy()
        return self

    def _window_start(self, unit: int) -> int:
        """First input sample that `unit` and later ones need, aligned so that both rates' phases agree."""
        first = unit * self._unit + (self._overlapping if unit else 0)
        start = max(0, first * self._in_step // self._out_step - self._context)
        return start // self._in_step * self._in_step

    def _window_end(self, unit: int) -> int:
        """One past the last input sample that `unit` needs."""
        last = (unit + 1) * self._unit + self._overlapping
        return -(-last * self._in_step // self._out_step) + self._context

    def _next(self, units: int) -> Float32:
        """A view, until the next push, of the input that the next units need; they count as taken."""
        start = self._window_start(self._units)
        self._units += units
        return self._samples.take(
            self._window_end(self._units - 1) - start, self._window_start(self._units) - start
        )


def offline_features(samples: Float32, sample_rate: int, config: FrontendConfig | None = None) -> Float32:
    """Un-normalised log-mel features [4 * ceil(n / 640), mel_bins] of a whole recording.

    Exactly what `Frontend` computes while streaming, end rule included; `n` counts model-rate samples.
    `samples` is mono float32 in [-1, 1]. Raises ValueError for a sample rate outside 8000..48000 Hz.
    """
    frontend = Frontend(sample_rate, config)
    frontend.push(samples)
    frontend.finish()
    c = frontend.config
    return frontend.take()[:, c.left_context :].reshape(-1, c.mel_bins)


def _joined(arrays: Sequence[Float32]) -> Float32:
    """All elements [n], read-only, without letting the interpreter's lock go for every array."""
    return np.frombuffer(b"".join([array.data for array in arrays]), np.float32)


class _Fifo:
    """Samples in order: amortised O(1) append and discard; the buffer shrinks again after a burst."""

    def __init__(self) -> None:
        self._buffer = np.zeros(2048, np.float32)
        self._start = 0
        self._end = 0

    def append(self, samples: Float32) -> None:
        n, held = len(samples), self._end - self._start
        if self._end + n > len(self._buffer):
            if held + n <= len(self._buffer):
                self._buffer.data[:held] = self._buffer.data[self._start : self._end]
                self._start, self._end = 0, held
            else:
                self._move(max(2048, 2 * (held + n)))
        # Not NumPy's copy, which lets the interpreter's lock go above 500 elements.
        self._buffer.data[self._end : self._end + n] = samples.data
        self._end += n

    def take(self, size: int, done: int) -> Float32:
        """The first `size` samples, until the next append; `done` of them are not needed again."""
        samples = self._buffer[self._start : self._start + size]
        self._start += done
        held = self._end - self._start
        if 8 * max(1024, held) <= len(self._buffer):
            self._move(max(2048, 2 * held))
        return samples

    def _move(self, size: int) -> None:
        held = self._end - self._start
        buffer = np.empty(size, np.float32)
        buffer[:held] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = buffer, 0, held

    def view(self) -> Float32:
        return self._buffer[self._start : self._end]
