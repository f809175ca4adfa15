"""Log-mel filter banks of many streams at once, in NumPy (ours; the definition is Kaldi's).

kaldi-native-fbank, which the tests compare with, takes its samples as a Python sequence: a number object for
each sample of each overlapping frame, made while the interpreter's lock is held, cost a server as much as the
transform itself and kept its event loop waiting meanwhile. Arrays cost neither.

The largest arrays are made once, because fresh memory costs a page fault for every 4 KiB.

A unit's rows do not depend, to the bit, on what else is in a call: every operation works on elements or on
single rows, and the product with the mel weights is one of fixed shape for each unit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_SCALE = 32768.0  # Kaldi's samples have the range of 16-bit integers
_EMPHASIS = np.float32(0.97)
_LEAST = np.finfo(np.float32).eps  # energy, so that its logarithm exists
_UNITS = 256  # at a time, in 6 MB of workspace


class Fbank:
    """Kaldi's log-mel energies: offset removed, pre-emphasis 0.97, Povey window, power spectrum, no dither.

    For one thread: it has workspace.

    Args:
        sample_rate: Hz.
        mel_bins: bands.
        low_freq: lower edge of the lowest band, Hz.
        high_freq: upper edge of the highest band, Hz; zero or negative: relative to half the sample rate.
        length: samples of a frame.
        shift: samples from one frame to the next.
        frames: frames of a unit.
    """

    def __init__(
        self,
        sample_rate: int,
        mel_bins: int,
        low_freq: float,
        high_freq: float,
        length: int,
        shift: int,
        frames: int,
    ) -> None:
        self._length, self._shift, self._frames = length, shift, frames
        self._size = 1 << (length - 1).bit_length()
        turn = 2 * np.pi * np.arange(length) / (length - 1)
        self._window = (_SCALE * (0.5 - 0.5 * np.cos(turn)) ** 0.85).astype(np.float32)
        high = high_freq if high_freq > 0 else sample_rate / 2 + high_freq
        self._weights = _mel_weights(sample_rate, self._size, mel_bins, low_freq, high)
        self._padded = np.zeros((_UNITS, frames, self._size), np.float32)
        self._spectrum = np.empty((_UNITS, frames, self._size // 2 + 1), np.complex64)
        self._power, self._part = np.empty((2, _UNITS, frames, self._size // 2), np.float32)

    def rows(self, units: Float32) -> Float32:
        """Log-mel rows [n * frames, mel_bins] of units [n, samples], each with the overhang it needs."""
        rows = np.empty((len(units), self._frames, self._weights.shape[1]), np.float32)
        for start in range(0, len(units), _UNITS):
            self._extract(units[start : start + _UNITS], rows[start : start + _UNITS])
        np.maximum(rows, _LEAST, out=rows)
        np.log(rows, out=rows)
        return rows.reshape(-1, rows.shape[2])

    def _extract(self, units: Float32, energies: Float32) -> None:
        """Mel energies [n, frames, mel_bins] of units [n, samples]; n is at most `_UNITS`."""
        n, length = len(units), self._length
        framed = _cut(units, (n, self._frames, length), self._shift)
        offsets = np.mean(framed, axis=2, keepdims=True)
        offsets *= 1 - _EMPHASIS
        # Emphasis is linear, so it can come before the offset goes, once for all frames that share a sample.
        rising = units[:, 1:] - _EMPHASIS * units[:, :-1]
        padded, spectrum = self._padded[:n], self._spectrum[:n]  # behind the frames there are zeros
        risen = _cut(rising, (n, self._frames, length - 1), self._shift)
        np.subtract(risen, offsets, out=padded[:, :, 1:length])
        # Before a frame's first sample Kaldi takes that sample once more.
        np.subtract((1 - _EMPHASIS) * framed[:, :, :1], offsets, out=padded[:, :, :1])
        padded[:, :, :length] *= self._window
        np.fft.rfft(padded, out=spectrum)  # type: ignore[arg-type]  # the stubs know complex128 only
        power, part = self._power[:n], self._part[:n]
        np.square(spectrum.real[:, :, :-1], out=power)
        np.square(spectrum.imag[:, :, :-1], out=part)
        power += part
        np.matmul(power, self._weights, out=energies)


def _cut(units: Float32, shape: tuple[int, int, int], shift: int) -> Float32:
    """A view [n, frames, length] of overlapping frames."""
    row, sample = units.strides
    return np.lib.stride_tricks.as_strided(units, shape, (row, shift * sample, sample), writeable=False)


def _mel_weights(rate: int, size: int, bins: int, low: float, high: float) -> Float32:
    """Weights [size / 2, bins]: triangles of equal width on the mel scale that overlap by half."""
    edges = np.linspace(_mel(low), _mel(high), bins + 2)
    mels = _mel(np.arange(size // 2) * (rate / size))[:, None]
    width = edges[1] - edges[0]
    rise, fall = (mels - edges[:-2]) / width, (edges[2:] - mels) / width
    weights: Float32 = np.maximum(np.minimum(rise, fall), 0).astype(np.float32)
    return weights


def _mel(hertz: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)
