"""The audio that load is made of: real recordings one after the other, again and again (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from realtide.cli.errors import CommandError

Samples = npt.NDArray[np.float32]
_PAUSE = 1.0  # seconds of silence after each recording: longer than what ends an utterance by default
_RECORDINGS = Path(__file__).resolve().parents[2] / "tests" / "data" / "audio"


def recordings(given: Sequence[Path] | None) -> list[Path]:
    """The recordings to play: `given`, or those that come with the source tree.

    Raises:
        CommandError: There are none.
    """
    found = list(given or sorted(_RECORDINGS.glob("*.flac")))
    if not found:
        raise CommandError("there are no recordings beside this installation: name some with --audio")
    return found


def loop(paths: Sequence[Path], rate: int, pause: float = _PAUSE) -> Samples:
    """All recordings at `rate` samples per second, each followed by `pause` seconds of silence.

    Raises:
        CommandError: A file is missing or is not audio.
    """
    parts: list[Samples] = []
    for path in paths:
        try:
            samples, own = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError) as error:
            raise CommandError(f"{path} cannot be read: {error}") from None
        parts += [soxr.resample(samples[:, 0], own, rate), np.zeros(round(pause * rate), np.float32)]
    return np.concatenate(parts)


def chunks(samples: Samples, size: int) -> list[Samples]:
    """Pieces of `size` samples; what is left at the end is filled up with silence."""
    padded = np.pad(samples, (0, -len(samples) % size))
    return list(padded.reshape(-1, size))


def linear16(samples: Samples) -> bytes:
    """Signed 16-bit little-endian samples."""
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes()
