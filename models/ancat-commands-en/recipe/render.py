"""From a plan to one training utterance: which clips, in which order, spoken how, heard how (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from augment import (
    RATE,
    Rng,
    Strength,
    Wave,
    add_noise,
    babble,
    change_channel,
    change_voice,
    colour_noise,
    fade,
    speech_bounds,
    speech_level,
    stretch_tempo,
    telephone,
    warp_speed,
)

from realtide.engines.ancat.frontend import offline_features

Words = tuple[tuple[str, float, float], ...]


def as_samples(wave: Wave) -> npt.NDArray[np.int16]:
    """16-bit samples of a waveform in [-1, 1]; what lies outside is clipped."""
    return np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)


def as_wave(samples: npt.NDArray[np.int16]) -> Wave:
    """Waveform in [-1, 1] of 16-bit samples."""
    return np.asarray(samples / 32768, np.float32)


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording in memory: int16 samples at 16 kHz, its text, and the `bounds` of its speech (samples)."""

    samples: npt.NDArray[np.int16]
    text: str
    set: str
    speaker: str
    kind: str
    bounds: tuple[int, int]

    def wave(self) -> Wave:
        """Samples in [-1, 1]."""
        return as_wave(self.samples)

    @property
    def speech_seconds(self) -> float:
        """Length of the part between the bounds."""
        return (self.bounds[1] - self.bounds[0]) / RATE


@dataclass(frozen=True, slots=True)
class Item:
    """One utterance to make: segments of clip numbers (several in one make a string of words), and a seed."""

    set: str
    segments: tuple[tuple[int, ...], ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """Audio, transcript, and word times in seconds where they are known."""

    wave: Wave
    text: str
    words: Words


def clip_of(wave: Wave, text: str, set_name: str, speaker: str, kind: str) -> Clip:
    """Hold `wave` as 16-bit samples with its speech bounds."""
    # Synthetic clips and FSDD takes have no noise around the word. A deep threshold keeps faint fricatives
    # of "six" and "three", which the threshold for noisy recordings would cut off.
    depth = (50.0, 3.0) if set_name == "fsdd" or kind == "synthetic" else (35.0, 6.0)
    return Clip(as_samples(wave), text, set_name, speaker, kind, speech_bounds(wave, *depth))


def trimmed(clip: Clip, rng: Rng, keep: tuple[float, float]) -> tuple[Wave, tuple[int, int]]:
    """The clip with a random margin of `keep` seconds around its speech, and where the speech is in that."""
    start, end = clip.bounds
    before, after = (int(rng.uniform(*keep) * RATE) for _ in range(2))
    first = max(0, start - before)
    return fade(clip.wave()[first : end + after]), (start - first, end - first)


def join_words(waves: Sequence[Wave], gaps: Sequence[int]) -> tuple[Wave, list[tuple[int, int]]]:
    """Lay `waves` in a row, `gaps[i]` samples (negative: overlap) before wave i+1; spans in samples."""
    spans: list[tuple[int, int]] = []
    at = 0
    for index, wave in enumerate(waves):
        if index:
            at = max(spans[-1][0] + 1, at + gaps[index - 1])
        spans.append((at, at + len(wave)))
        at += len(wave)
    out = np.zeros(max(end for _, end in spans), np.float32)
    for (start, end), wave in zip(spans, waves, strict=True):
        out[start:end] += wave
    return out, spans


def _string(clips: Sequence[Clip], rng: Rng, strength: Strength) -> tuple[Wave, Words]:
    """Single takes as one connected string: one voice change for all, levels matched to within 3 dB."""
    speed = float(rng.uniform(*strength.speed)) if rng.random() < strength.p_speed else 1.0
    tempo = float(rng.uniform(*strength.tempo)) if rng.random() < strength.p_tempo else 1.0
    level = speech_level(clips[0].wave())
    waves: list[Wave] = []
    spoken: list[tuple[float, float]] = []  # where in each wave the word is, seconds
    for clip in clips:
        # Little of a take's own edges is kept: words of connected speech follow without a pause.
        cut, bounds = trimmed(clip, rng, (0.03, 0.1))
        wave = stretch_tempo(warp_speed(cut, speed), tempo)
        scale = len(wave) / len(cut) / RATE
        spoken.append((bounds[0] * scale, min(bounds[1], len(cut)) * scale))
        waves.append(wave * np.float32(level / speech_level(wave) * 10 ** (rng.uniform(-3, 3) / 20)))
    tight = rng.random() < 0.4
    limits = (-0.05, 0.08) if tight else (0.0, 0.3)
    gaps = [int(rng.uniform(*limits) * RATE) for _ in clips[1:]]
    wave, spans = join_words(waves, gaps)
    words = tuple(
        (clip.text, span[0] / RATE + start, span[0] / RATE + end)
        for clip, span, (start, end) in zip(clips, spans, spoken, strict=True)
    )
    return wave, words


def _segment(clips: Sequence[Clip], rng: Rng, strength: Strength) -> tuple[Wave, str, Words]:
    text = " ".join(clip.text for clip in clips)
    if len(clips) > 1:
        wave, words = _string(clips, rng, strength)
        return wave, text, words
    clip = clips[0]
    whole = clip.set != "asterisk" and rng.random() < 0.2
    wave = clip.wave() if whole else trimmed(clip, rng, (0.08, 0.45))[0]
    return change_voice(wave, rng, strength), text, ()


def render(item: Item, clips: Sequence[Clip], noises: Sequence[Wave], strength: Strength) -> Rendered:
    """Make one training utterance: segments, pauses between, silence around, then one channel for all."""
    rng = np.random.default_rng(item.seed)
    pieces: list[Wave] = []
    words: list[tuple[str, float, float]] = []
    texts: list[str] = []
    known = True
    lead = 0.0 if rng.random() < 0.25 else float(rng.uniform(0, 0.6))
    at = int(lead * RATE)
    pieces.append(np.zeros(at, np.float32))
    level: float | None = None
    for index, segment in enumerate(item.segments):
        if index:
            pause = int(rng.uniform(0.3, 1.0) * RATE)
            pieces.append(np.zeros(pause, np.float32))
            at += pause
        wave, text, times = _segment([clips[i] for i in segment], rng, strength)
        if level is None:
            level = speech_level(wave)
        else:
            wave = wave * np.float32(level / speech_level(wave) * 10 ** (rng.uniform(-5, 5) / 20))
        pieces.append(wave)
        texts.append(text)
        known &= bool(times)
        words.extend((word, start + at / RATE, end + at / RATE) for word, start, end in times)
        at += len(wave)
    trail = 0.0 if rng.random() < 0.2 else float(rng.uniform(0.1, 0.8))
    pieces.append(np.zeros(int(trail * RATE), np.float32))
    wave = np.concatenate(pieces)
    if rng.random() < 0.6:
        # The hush of a room, or cut edges and inserted pauses would be told from speech by their digital
        # silence.
        hush = colour_noise("pink" if rng.random() < 0.5 else "brown", len(wave), rng)
        wave = add_noise(wave, hush, float(rng.uniform(30, 60)))
    wave = change_channel(wave, rng, strength, noises)
    return Rendered(wave, " ".join(texts), tuple(words) if known else ())


def features_of(wave: Wave) -> npt.NDArray[np.float16]:
    """Log-mel [T, 80] from the product's own front end, T a multiple of 4."""
    return offline_features(wave, RATE).astype(np.float16)


def harder(wave: Wave, variant: str, index: int, noises: Sequence[Wave]) -> Wave:
    """A fixed harder version of a test clip: "noise10" (babble or pink by turns, 10 dB) or "phone" (G.711).

    Raises ValueError for another variant.
    """
    if variant == "noise10":
        rng = np.random.default_rng(index)
        noise = babble(noises, len(wave), rng) if index % 2 else colour_noise("pink", len(wave), rng)
        loud = add_noise(wave, noise, 10.0)
        return loud / np.float32(max(1.0, float(np.max(np.abs(loud)))))
    if variant == "phone":
        return telephone(wave)[: len(wave)]
    raise ValueError(f"variant must be noise10 or phone, got {variant!r}")
