"""A little of the work that a speech bundle is for, to see what numbers its programs compute with (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from realtide.bundle import Bundle, BundleError
from realtide.engines.ancat.backends import Loaded, Source, host_joiner
from realtide.engines.ancat.config import static_shapes
from realtide.engines.ancat.device_rows import DeviceRows
from realtide.engines.ancat.engine import AncatEngine, load
from realtide.engines.ancat.search import Joiner
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.static_encoder import StaticEncoder
from realtide.engines.ancat.types import Audio, Finish, SpeechOptions
from realtide.engines.runtime.memory import HOST
from realtide.engines.runtime.program import Array, Runs

MOST_RECORDINGS, MOST_SECONDS, CHUNK_SECONDS = 8, 10.0, 0.1
SUFFIXES = (".flac", ".wav", ".ogg")


def run(
    bundle: Bundle, program_of: Callable[[str, Mapping[str, Array]], Runs], recordings: Path | None = None
) -> str:
    """Transcribe up to eight recordings at once, at most ten seconds of each, in chunks of 0.1 s.

    Both forms of the encoder do it, the static one if the bundle has it.

    Args:
        bundle: what transcribes.
        program_of: runs a program, given its name and its state, which the program updates.
        recordings: directory of FLAC, WAV or OGG files, taken in the order of their names.

    Returns:
        What was done; one clause.

    Raises:
        BundleError: there are no recordings, or the bundle is not usable.
        ProgramError: a program cannot be run.
    """
    found = [] if recordings is None else sorted(p for p in recordings.glob("*") if p.suffix in SUFFIXES)
    chosen = found[:MOST_RECORDINGS]
    if not chosen:
        raise BundleError(
            f"recordings: must be a directory with {', '.join(SUFFIXES)} files, not {recordings}"
        )
    joiners: list[Joiner] = []

    def packed(source: Source) -> Loaded:
        state = source.arrays()
        joiners.append(host_joiner(program_of("joiner", {})))
        return Loaded(program_of("encoder", state), joiners[0], source.rows(state))

    def static(source: Source) -> Loaded:
        config, frames = source.config, source.step_frames
        shapes = static_shapes(config, frames).items()
        # One slot more than there are sessions: calls are filled up with it.
        state = {n: np.zeros(((source.slots + 1) * rows, *s), dtype) for n, (rows, s, dtype) in shapes}
        program = program_of("encoder_static", state)
        encoder = StaticEncoder(program, HOST, config, frames, source.max_batch, spare=source.slots)
        return Loaded(encoder, joiners[0], DeviceRows(HOST, state, config, frames, source.slots))

    forms = [packed, static] if "encoder_static" in bundle.manifest.programs else [packed]
    for form in forms:
        engine = load(bundle, slots=len(chosen), max_batch=len(chosen), precision="fp32", programs=form)
        _transcribe(engine, chosen)
    return f"{len(chosen)} recordings, up to {MOST_SECONDS:g} s of each, transcribed together"


def _transcribe(engine: AncatEngine, recordings: Sequence[Path]) -> None:
    streams: list[tuple[SpeechSession, list[Audio | Finish]]] = []
    for path in recordings:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            session = engine.open(SpeechOptions(sample_rate=rate))
        except (soundfile.LibsndfileError, ValueError) as error:
            raise BundleError(f"recordings: {path}: {error}") from None
        heard, size = samples[: round(rate * MOST_SECONDS)].mean(axis=1), round(rate * CHUNK_SECONDS)
        chunks = [Audio(heard[k : k + size], 0.0) for k in range(0, len(heard), size)]
        streams.append((session, [*chunks, Finish()]))
    while not all(session.done for session, _ in streams):
        for session, left in streams:
            if left:
                session.push(left.pop(0))
        ready = [session for session, _ in streams if session.runnable()]
        if ready:
            engine.step(ready, lambda stage, seconds, batch: None)
    for session, _ in streams:
        session.close()
