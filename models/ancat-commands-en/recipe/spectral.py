"""Augmentation of log-mel features while training: every look at a clip is a new one, at no rendering (ours).

Voices, rooms, noises, microphones and lines as in augment.py, but applied to log-mel power [F, 80] as the
front end gives it (natural logarithm, 10 ms frames), where each is a few operations on a small array. A
warped frequency axis stands for another vocal tract, a resampled time axis for another tempo, a decaying sum
over past frames for a room, a sum of powers for noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

Mel = npt.NDArray[np.float32]
Rng = np.random.Generator
Words = Sequence[tuple[str, float, float]]
BINS = 80
LOWEST, HIGHEST = 20.0, 7600.0  # Hz, edges of the mel filters
FRAME = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class Strength:
    """How often each effect strikes (probabilities) and how hard (ranges; levels in decibels)."""

    tempo: tuple[float, float] = (0.88, 1.14)
    tract: tuple[float, float] = (0.92, 1.09)
    snr_db: tuple[float, float] = (10.0, 35.0)
    gain_db: float = 4.0  # standard deviation
    colour_db: float = 1.5  # standard deviation of each wave of a microphone's frequency response
    p_trim: float = 0.85
    p_tempo: float = 0.6
    p_tract: float = 0.6
    p_room: float = 0.15
    p_noise: float = 0.25
    p_telephone: float = 0.1
    frequency_masks: tuple[int, int] = (1, 6)  # how many, widest in bins
    time_masks: tuple[float, int] = (0.3, 5)  # how many a second, longest in frames


STRENGTHS = {
    "mild": Strength(),
    "full": Strength(
        tempo=(0.8, 1.25), tract=(0.87, 1.15), snr_db=(5.0, 30.0), gain_db=6.0, colour_db=2.5,
        p_tempo=0.8, p_tract=0.8, p_room=0.3, p_noise=0.4, p_telephone=0.15,
        frequency_masks=(2, 8), time_masks=(0.7, 8),
    ),
}  # fmt: skip


def mel_of(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Kaldi's mel scale."""
    return np.asarray(1127.0 * np.log1p(hertz / 700.0))


@cache
def centres() -> npt.NDArray[np.float64]:
    """Centre frequencies [80] of the mel filters, Hz."""
    low, high = mel_of(np.array([LOWEST, HIGHEST]))
    return np.asarray(700.0 * np.expm1(np.linspace(low, high, BINS + 2)[1:-1] / 1127.0))


@cache
def _flutter() -> Mel:
    """Log power [4096, 80] of noise whose expected power is 1 in every bin: wide filters flutter less."""
    rng = np.random.default_rng(5)
    edges = np.diff(centres(), append=HIGHEST) * 2 / 31.25  # FFT bins under a filter
    shape = np.maximum(1.0, 0.7 * edges)
    power = rng.gamma(shape, 1.0 / shape, size=(4096, BINS))
    power = 0.5 * (power + np.roll(power, 1, axis=0))  # frames overlap
    return np.log(np.maximum(power, 1e-4)).astype(np.float32)


def speech_span(mel: Mel) -> tuple[int, int]:
    """First and one-past-last frame of what is louder than the clip's quiet."""
    loudness = mel.mean(1)
    low, high = np.percentile(loudness, [5, 95])
    loud = np.flatnonzero(loudness > low + 0.3 * (high - low))
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) and high - low > 1 else (0, len(mel))


def trim(mel: Mel, words: Words, rng: Rng) -> tuple[Mel, Words]:
    """Cut silence before and after speech to 0.1 to 0.8 s of it (what the clip has less stays)."""
    first, last = speech_span(mel)
    first = max(0, first - int(rng.uniform(10, 80)))
    last = min(len(mel), last + int(rng.uniform(15, 80)))
    shift = first * FRAME
    return mel[first:last], [(w, a - shift, b - shift) for w, a, b in words]


def change_tempo(mel: Mel, words: Words, factor: float) -> tuple[Mel, Words]:
    """Say it `factor` times as fast: frames are interpolated."""
    count = max(8, int(len(mel) / factor))
    at = np.linspace(0, len(mel) - 1, count)
    low = at.astype(np.int64)
    share = (at - low).astype(np.float32)[:, None]
    high = np.minimum(low + 1, len(mel) - 1)
    out = mel[low] * (1 - share) + mel[high] * share
    return out, [(w, a / factor, b / factor) for w, a, b in words]


def change_tract(mel: Mel, factor: float) -> Mel:
    """Move formants to `factor` times their frequency."""
    source = mel_of(np.clip(centres() / factor, LOWEST, HIGHEST))
    own = mel_of(centres())
    at = np.interp(source, own, np.arange(BINS))
    low = np.minimum(at.astype(np.int64), BINS - 2)
    share = (at - low).astype(np.float32)
    return np.asarray(mel[:, low] * (1 - share) + mel[:, low + 1] * share)


def change_colour(mel: Mel, rng: Rng, strength: Strength) -> Mel:
    """Another microphone and level: a smooth frequency response and a gain."""
    axis = np.linspace(0, np.pi, BINS)
    waves = np.stack([np.cos(k * axis) for k in (1, 2, 3)])
    decibels = rng.normal(0, strength.colour_db, 3) @ waves + rng.normal(0, strength.gain_db)
    return mel + (decibels * np.log(10) / 10).astype(np.float32)


def reverberate(mel: Mel, rng: Rng) -> Mel:
    """A room: power decays by 60 dB in 0.1 to 0.6 s, 3 to 15 dB under the direct sound in all."""
    decay = 10 ** (-6 * FRAME / rng.uniform(0.1, 0.6))
    gain = 10 ** (-rng.uniform(3, 15) / 10) * (1 - decay)
    power = np.exp(np.minimum(mel, 40.0))
    tail = lfilter([0.0, gain], [1.0, -decay], power, axis=0)
    return np.log(power + tail + 1e-10).astype(np.float32)


def level(mel: Mel) -> float:
    """Log power of speech: the mean over bins' total in the louder frames."""
    total = np.log(np.exp(np.minimum(mel, 40.0)).sum(1) + 1e-10)
    return float(np.mean(total[total >= np.percentile(total, 70)]))


def add_noise(mel: Mel, rng: Rng, strength: Strength, others: Sequence[Mel]) -> Mel:
    """Noise of a random colour, or babble of `others`, at a random distance below speech."""
    frames = len(mel)
    noise: npt.NDArray[np.floating]
    if others and rng.random() < 0.4:
        voices = [np.resize(other, (frames, BINS)) for other in others]
        noise = np.log(sum(np.exp(np.minimum(v, 40.0) - level(v)) for v in voices) + 1e-10)
        noise = np.roll(noise, int(rng.integers(frames)), axis=0)
    else:
        start = int(rng.integers(4096))
        noise = np.take(_flutter(), np.arange(start, start + frames), axis=0, mode="wrap")
        # White noise has power in proportion to a filter's width; pink and brown fall by octaves.
        width = np.log(np.diff(centres(), append=HIGHEST))
        noise = noise + width - rng.uniform(0, 2) * np.log(centres() / 1000.0)
    below = (
        level(np.asarray(noise, np.float32)) - level(mel) + rng.uniform(*strength.snr_db) * np.log(10) / 10
    )
    return np.logaddexp(mel, noise - below).astype(np.float32)


def telephone(mel: Mel, rng: Rng) -> Mel:
    """A line of 300 to 3400 Hz, or a recording at 8 kHz: hardly anything is left above."""
    out = mel.copy()
    high = centres() > rng.uniform(3400, 4000)
    out[:, high] *= 0.1
    low = centres() < 300
    out[:, low] -= (12 * np.log(300 / centres()[low]) / np.log(2) * np.log(10) / 10).astype(np.float32)
    return out


def mask(normalised: Mel, rng: Rng, strength: Strength) -> Mel:
    """SpecAugment (Park et al. 2019) with few and small masks: wide ones hide whole digits."""
    out = normalised.copy()
    count, widest = strength.frequency_masks
    for _ in range(count):
        width = int(rng.integers(0, widest + 1))
        start = int(rng.integers(0, BINS - width))
        out[:, start : start + width] = 0.0
    rate, longest = strength.time_masks
    for _ in range(int(rng.poisson(rate * len(out) * FRAME))):
        width = int(rng.integers(1, longest + 1))
        start = int(rng.integers(0, max(1, len(out) - width)))
        out[start : start + width] = 0.0
    return out


def vary(
    mel: Mel, words: Words, rng: Rng, others: Sequence[Mel], strength: Strength, *, short: bool = True
) -> tuple[Mel, Words]:
    """One utterance [F, 80] said and heard otherwise, with its words' times moved along.

    `short`: without most of the silence around it (a batch's decision, `Strength.p_trim`: one long utterance
    would have all others padded).
    """
    if short:
        mel, words = trim(mel, words, rng)
    if rng.random() < strength.p_tempo:
        mel, words = change_tempo(mel, words, float(np.exp(rng.uniform(*np.log(strength.tempo)))))
    if rng.random() < strength.p_tract:
        mel = change_tract(mel, float(rng.uniform(*strength.tract)))
    if rng.random() < strength.p_room:
        mel = reverberate(mel, rng)
    mel = change_colour(mel, rng, strength)
    if rng.random() < strength.p_noise:
        mel = add_noise(mel, rng, strength, others)
    if rng.random() < strength.p_telephone:
        mel = telephone(mel, rng)
    return np.maximum(mel, 0.0), words  # the front end's least value, digital silence
