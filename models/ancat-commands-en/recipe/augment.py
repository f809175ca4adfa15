"""Augmentation of 16 kHz waveforms: voices, rooms, noises, levels and lines that recordings lack (ours).

Every function takes a `numpy.random.Generator` and is a pure function of it and its input, so a seed fixes
the pool. Waveforms are float32 [samples] in about [-1, 1]. No recorded noise is used: noises are synthetic
colours, or babble made of other training clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import soxr
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

Wave = npt.NDArray[np.float32]
Rng = np.random.Generator
RATE = 16000
COLOURS = ("white", "pink", "brown")


def warp_speed(wave: Wave, factor: float) -> Wave:
    """Play `factor` times as fast by resampling: tempo, pitch and formants all move."""
    if abs(factor - 1) < 1e-3:
        return wave
    # Rates are whole numbers to soxr's quick mode only; the recipe's default quality takes any ratio.
    return np.asarray(soxr.resample(wave, RATE * factor, RATE), np.float32)


def stretch_tempo(wave: Wave, factor: float) -> Wave:
    """Play `factor` times as fast at the same pitch: overlap-add of 30 ms pieces aligned by correlation.

    Source: Verhelst and Roelands, WSOLA, ICASSP 1993 (this is its plain form with a 7.5 ms search).
    """
    size, hop, search = 480, 240, 120
    if abs(factor - 1) < 1e-2 or len(wave) < 3 * size:
        return wave
    window = np.hanning(size + 1)[:size].astype(np.float32)
    source = np.concatenate([np.zeros(search, np.float32), wave, np.zeros(size + 2 * search, np.float32)])
    count = int(len(wave) / factor / hop)
    out = np.zeros(count * hop + size, np.float32)
    expected = source[search : search + size]
    for index in range(count):
        centre = int(index * hop * factor)
        region = source[centre : centre + size + 2 * search]
        if len(region) < size + 2 * search:
            break
        shift = int(np.argmax(np.correlate(region, expected, "valid")))
        piece = region[shift : shift + size]
        out[index * hop : index * hop + size] += piece * window
        start = centre + shift + hop
        expected = source[start : start + size]
        if len(expected) < size:
            break
    return out[: max(1, int(len(wave) / factor))]


@cache
def _noise_loop(colour: str) -> Wave:
    """Half a minute of noise of unit power that joins end to start without a seam, made once."""
    size = 1 << 19
    rng = np.random.default_rng(COLOURS.index(colour))
    spectrum = np.fft.rfft(rng.standard_normal(size))
    # Levelled off under 50 Hz, or nearly all power would lie below what a microphone passes.
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 50.0)
    noise = np.fft.irfft(spectrum / frequency ** (0.5 * COLOURS.index(colour)), size)
    return np.asarray(noise / np.sqrt(np.mean(noise**2)), np.float32)


def colour_noise(colour: str, samples: int, rng: Rng) -> Wave:
    """Noise of unit power whose spectrum is flat (white) or falls 3 dB (pink) or 6 dB (brown) an octave.

    A stretch of a fixed loop from a random place: a transform for every clip would cost more than all other
    effects. Raises ValueError for another colour.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour must be one of {', '.join(COLOURS)}, got {colour!r}")
    loop = _noise_loop(colour)
    start = int(rng.integers(len(loop)))
    return np.take(loop, np.arange(start, start + samples), mode="wrap")


def babble(clips: Sequence[Wave], samples: int, rng: Rng, voices: int = 4) -> Wave:
    """Several people at once, unit power: `voices` clips drawn from `clips`, levelled, repeated to length."""
    total = np.zeros(samples, np.float32)
    for index in rng.integers(len(clips), size=voices):
        clip = clips[int(index)]
        clip = np.roll(np.resize(clip, samples), int(rng.integers(samples)))
        total += clip / (np.sqrt(np.mean(clip**2)) + 1e-6)
    return np.asarray(total / (np.sqrt(np.mean(total**2)) + 1e-12), np.float32)


def speech_level(wave: Wave) -> float:
    """Root mean square of the louder half of 20 ms frames: the level of the speech, not of the pauses."""
    frames = wave[: len(wave) // 320 * 320].reshape(-1, 320)
    if len(frames) < 2:
        return float(np.sqrt(np.mean(wave**2)) + 1e-9)
    power = np.sort(np.mean(frames**2, axis=1))
    return float(np.sqrt(power[len(power) // 2 :].mean()) + 1e-9)


def add_noise(wave: Wave, noise: Wave, snr_db: float) -> Wave:
    """`wave` plus unit-power `noise` (same length) at `snr_db` below the speech's level."""
    return np.asarray(wave + noise * (speech_level(wave) * 10 ** (-snr_db / 20)), np.float32)


def room_response(rng: Rng, rt60: float | None = None) -> Wave:
    """A room's impulse response whose direct sound is sample 0, so that words keep their times.

    Some early reflections within 40 ms, then noise that decays by 60 dB in `rt60` seconds (0.1 to 0.5 by
    default), 3 to 15 dB under the direct sound.
    """
    decay = float(rng.uniform(0.1, 0.5)) if rt60 is None else rt60
    samples = int(decay * RATE)
    time = np.arange(samples) / RATE
    tail = rng.standard_normal(samples) * 10 ** (-3 * time / decay)
    tail[: int(0.005 * RATE)] = 0
    for delay in rng.uniform(0.001, 0.04, size=int(rng.integers(3, 9))):
        at = int(delay * RATE)
        if at < samples:
            tail[at] += rng.uniform(-1, 1) * 6 * 10 ** (-3 * delay / decay)
    ratio_db = float(rng.uniform(3, 15))
    tail *= 10 ** (-ratio_db / 20) / (np.sqrt(np.sum(tail**2)) + 1e-12)
    response = tail
    response[0] = 1.0
    return response.astype(np.float32)


def reverberate(wave: Wave, response: Wave) -> Wave:
    """`wave` in the room of `response`, cut to its own length, at its own level."""
    wet = fftconvolve(wave, response)[: len(wave)]
    return np.asarray(wet * (speech_level(wave) / speech_level(wet)), np.float32)


@cache
def _telephone_band() -> npt.NDArray[np.float64]:
    return np.asarray(butter(4, [300, 3400], "bandpass", fs=8000, output="sos"))


def telephone(wave: Wave, mu_law: bool = True) -> Wave:
    """A telephone line: 300-3400 Hz, 8 kHz and, if `mu_law`, 8-bit companding (ITU-T G.711)."""
    narrow = np.asarray(soxr.resample(wave, RATE, 8000), np.float32)
    narrow = sosfilt(_telephone_band(), narrow)
    if mu_law:
        clipped = np.clip(narrow, -1, 1)
        code = np.round(np.sign(clipped) * np.log1p(255 * np.abs(clipped)) / np.log(256) * 127) / 127
        narrow = np.sign(code) * np.expm1(np.abs(code) * np.log(256)) / 255
    return np.asarray(soxr.resample(np.asarray(narrow, np.float32), 8000, RATE), np.float32)


def tilt(wave: Wave, rng: Rng) -> Wave:
    """Another microphone: a first-order shelf that lifts or lowers the treble by up to 8 dB, level kept."""
    gain = 10 ** (float(rng.uniform(-8, 8)) / 20)
    corner = float(rng.uniform(500, 3000))
    # First-order low-pass by the bilinear transform, written out: designing it anew took longer than
    # filtering.
    k = np.tan(np.pi * corner / RATE)
    low = lfilter([k / (1 + k), k / (1 + k)], [1, (k - 1) / (k + 1)], wave)
    changed = low + gain * (wave - low)
    return np.asarray(
        changed * (speech_level(wave) / speech_level(np.asarray(changed, np.float32))), np.float32
    )


def fade(wave: Wave, milliseconds: float = 5.0) -> Wave:
    """Raised-cosine fades of both ends, so that cut edges do not click."""
    size = min(int(milliseconds * RATE / 1000), len(wave) // 2)
    if size == 0:
        return wave
    ramp = (0.5 - 0.5 * np.cos(np.pi * np.arange(size) / size)).astype(np.float32)
    out = wave.copy()
    out[:size] *= ramp
    out[-size:] *= ramp[::-1]
    return out


def speech_bounds(wave: Wave, depth_db: float = 35.0, above_floor_db: float = 6.0) -> tuple[int, int]:
    """First and one-past-last sample of speech: 10 ms frames within `depth_db` of the loudest ones.

    The threshold never falls under `above_floor_db` above the clip's own noise floor (its 5th percentile).
    An all-quiet clip counts as speech whole.
    """
    hop = RATE // 100
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop)
    if len(frames) < 3:
        return 0, len(wave)
    level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)
    loud, quiet = np.percentile(level, 97), np.percentile(level, 5)
    threshold = min(max(loud - depth_db, quiet + above_floor_db), loud - 6)
    active = np.flatnonzero(level > threshold)
    if len(active) == 0:
        return 0, len(wave)
    return int(active[0]) * hop, min(len(wave), (int(active[-1]) + 1) * hop)


@dataclass(frozen=True, slots=True)
class Strength:
    """How often each effect strikes (probabilities) and how hard (ranges)."""

    speed: tuple[float, float] = (0.85, 1.15)
    tempo: tuple[float, float] = (0.8, 1.25)
    peak_db: tuple[float, float] = (-32.0, 3.0)  # of full scale; above 0 the loudest samples clip
    snr_db: tuple[float, float] = (5.0, 30.0)
    p_speed: float = 0.8
    p_tempo: float = 0.4
    p_tilt: float = 0.4
    p_room: float = 0.4
    p_noise: float = 0.55
    p_telephone: float = 0.25


def change_voice(wave: Wave, rng: Rng, strength: Strength) -> Wave:
    """Another speaker's rate, pitch and tract."""
    if rng.random() < strength.p_speed:
        wave = warp_speed(wave, float(rng.uniform(*strength.speed)))
    if rng.random() < strength.p_tempo:
        wave = stretch_tempo(wave, float(rng.uniform(*strength.tempo)))
    return wave


def change_channel(wave: Wave, rng: Rng, strength: Strength, clips: Sequence[Wave]) -> Wave:
    """Another room, background, microphone, line and level; keeps length and times, ends in [-1, 1]."""
    if rng.random() < strength.p_room:
        wave = reverberate(wave, room_response(rng))
    if rng.random() < strength.p_tilt:
        wave = tilt(wave, rng)
    if rng.random() < strength.p_noise:
        if rng.random() < 0.35 and clips:
            noise = babble(clips, len(wave), rng, voices=int(rng.integers(2, 7)))
        else:
            noise = colour_noise(COLOURS[int(rng.integers(3))], len(wave), rng)
        wave = add_noise(wave, noise, float(rng.uniform(*strength.snr_db)))
    if rng.random() < strength.p_telephone:
        wave = telephone(wave, mu_law=bool(rng.random() < 0.7))[: len(wave)]
    peak = float(np.max(np.abs(wave)) + 1e-9)
    gain = 10 ** (float(rng.uniform(*strength.peak_db)) / 20) / peak
    wave = np.clip(wave * np.float32(gain), -1, 1)
    if rng.random() < 0.6:
        # A 16 kHz device delivers 16-bit integers; the rest stand for 8 kHz lines, whose empty upper band has
        # no rounding noise once the front end has resampled it.
        wave = np.asarray(np.round(wave * 32768) / 32768, np.float32)
    return np.asarray(np.clip(wave, -1, 1), np.float32)
