"""The engine: streaming equals offline on real recordings, whoever else is in the step; slots and limits."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from realtide.bundle import BundleError
from realtide.engines.ancat.config import threshold
from realtide.engines.ancat.engine import load
from realtide.engines.ancat.latency import availability, cap_depths
from realtide.engines.ancat.offline import encode, hard_arcs
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.types import Audio, EndpointRules, Flush, SpeechInput, SpeechOptions
from realtide.engines.engine import SlotsExhausted
from realtide.engines.runtime.program import ProgramError
from tests.engines.ancat.conftest import Clip, SmallBundle
from tests.engines.ancat.oracle import Dial, Oracle
from tests.engines.ancat.playing import CHUNKS, Heard, Room, ignore, whole

BACKENDS = ("onnxruntime", "torch")
BIASES = {"digit-seven": -1.0, "wake-smart-mirror": 0.0, "librispeech-begin": 0.75, "coffee-mocha": 2.0}
CLOSE = 1e-4


@pytest.fixture(scope="module", params=BACKENDS)
def room(request: pytest.FixtureRequest, bundle: SmallBundle) -> Room:
    return Room(bundle.path, request.param)


def options(clip: Clip, bias: float = 0.0, **more: int | None) -> SpeechOptions:
    return SpeechOptions(sample_rate=clip.rate, lookahead_bias=bias, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def offline(bundle: SmallBundle, clips: dict[str, Clip]) -> dict[str, tuple[Heard, int]]:
    """What the offline encoder with the same hard arcs gives for each clip of `BIASES`, and its length."""
    room = Room(bundle.path)
    model = room.engine._model
    found = {}
    for name, bias in BIASES.items():
        clip = clips[name]
        windows = bundle.windows(clip)
        scores: list[torch.Tensor] = []
        arcs = hard_arcs(bundle.config, bias)

        def watched(layer: int, score: torch.Tensor | None, frames: int) -> torch.Tensor:
            assert score is not None
            scores.append(score)  # noqa: B023
            return arcs(layer, score, frames)  # noqa: B023

        with torch.no_grad():
            out = encode(bundle.model.encoder, windows[None], torch.tensor([len(windows)]), watched)
        # Rounding must not decide an arc here, or arcs could not be compared: else choose other weights.
        assert (torch.stack(scores) - threshold(bias)).abs().min() > 1e-4
        depths = out.arcs[0].sum(-1).long().numpy()
        heard = Heard(rows=[out.rows[0].numpy()], available=availability(depths)[-1].tolist())
        state = model.decoder.new_state(options(clip, bias))
        state.audio_end = len(clip.samples) / clip.rate
        at = np.array(heard.available)
        heard.events = model.decoder.advance([state], heard.encoded, at, [len(at)], final=["finish"])[0]
        found[name] = heard, len(windows)
    return found


class Passing:
    """Streams that begin and stop at any time: half way, between frames, without audio, after their end."""

    def __init__(self, room: Room, clips: dict[str, Clip], rng: random.Random) -> None:
        self.room, self.clips, self.rng = room, clips, rng
        self.left: dict[SpeechSession, list[SpeechInput]] = {}
        self.begun = 0

    def tick(self) -> list[SpeechSession]:
        """Some come, some go, some audio arrives; those that are open now."""
        rng = self.rng
        for session in list(self.left):
            if session.done or rng.random() < 0.05:
                session.close()
                del self.left[session]
        if len(self.left) < 2 and rng.random() < 0.5:
            clip = self.clips[rng.choice(("digit-three", "wake-alexa"))]
            session = self.room.engine.open(options(clip, rng.uniform(-4, 4)))
            self.left[session] = whole(clip.samples, clip.rate, "random", rng.randint(0, 99))
            self.begun += 1
        for session, inputs in self.left.items():
            if inputs and rng.random() < 0.8:
                self.room.push(session, inputs.pop(0))
        return list(self.left)

    def stop(self) -> None:
        for session in self.left:
            session.close()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_streaming_equals_offline_among_other_streams(
    room: Room, clips: dict[str, Clip], offline: dict[str, tuple[Heard, int]], chunk: str
) -> None:
    rng = random.Random(chunk)
    room.sizes.clear()
    sessions = {name: room.engine.open(options(clips[name], bias)) for name, bias in BIASES.items()}
    left = {n: whole(clips[n].samples, clips[n].rate, chunk, seed=4) for n in BIASES}
    others = Passing(room, clips, rng)
    while not all(session.done for session in sessions.values()):
        present = others.tick()
        for name, session in sessions.items():
            if left[name] and rng.random() < 0.8:
                room.push(session, left[name].pop(0))
        # Not every session is in every step, and some have a burst behind them.
        room.step(*(s for s in [*sessions.values(), *present] if rng.random() < 0.7))
    others.stop()
    for name, session in sessions.items():
        want, frames = offline[name]
        have = room.of(session)
        assert have.available == want.available
        assert have.encoded.shape == (frames, want.encoded.shape[1])
        assert np.abs(have.encoded - want.encoded).max() < CLOSE
        assert have.words() == want.words()
        for one, other_final in zip(have.finals, want.finals, strict=True):
            assert one.confidence == pytest.approx(other_final.confidence, abs=1e-3)
            assert one.lookahead_mean == pytest.approx(other_final.lookahead_mean)
        session.close()
    assert others.begun >= 2
    assert len(set(room.sizes)) >= 4  # steps of many compositions
    assert room.engine.free_slots == room.engine.slots
    room.heard.clear()


def test_the_recordings_give_words_and_depths_that_vary(offline: dict[str, tuple[Heard, int]]) -> None:
    for heard, frames in offline.values():
        waits = {a - i for i, a in enumerate(heard.available)}
        assert len(waits) > 3
        tokens = sum(len(final.text) for final in heard.finals)
        assert 0 < tokens < 20 * frames


@pytest.mark.parametrize("limit", [0, 40, 130, 240])
def test_no_result_looks_further_ahead_than_the_cap(
    room: Room, bundle: SmallBundle, clips: dict[str, Clip], limit: int
) -> None:
    clip = clips["librispeech-begin"]
    oracle = Oracle(bundle.model.encoder).feed(bundle.windows(clip), Dial(4.0, limit // 40), final=True)
    _, exact = cap_depths(np.array(oracle.wanted), limit // 40)
    for chunk in ("37 ms", "all at once"):
        session = room.engine.open(options(clip, 4.0, max_lookahead_ms=limit))
        heard = room.play(session, whole(clip.samples, clip.rate, chunk))
        session.close()
        assert heard.available == oracle.available == exact[-1].tolist()
        assert np.abs(heard.encoded - oracle.output.numpy()).max() < CLOSE
        waits = [a - i for i, a in enumerate(heard.available)]
        assert max(waits) == limit // 40  # it binds, and it holds
        words = [word for final in heard.finals for word in final.words]
        assert words
        assert max(word.lookahead for word in words) * 1000 <= limit
        assert all(final.lookahead_p90 * 1000 <= limit for final in heard.finals)
        room.heard.clear()


@pytest.mark.parametrize(("bias", "depth"), [(6.0, 3), (-6.0, 0)])
def test_the_ends_of_the_dial(
    room: Room, bundle: SmallBundle, clips: dict[str, Clip], bias: float, depth: int
) -> None:
    assert room.engine.info.lookahead_bias_range == (-6.0, 6.0)
    clip = clips["digit-three"]
    session = room.engine.open(options(clip, bias))
    heard = room.play(session, whole(clip.samples, clip.rate, "10 ms"))
    session.close()
    depths = np.full((bundle.config.layers, len(heard.available)), depth)
    assert heard.available == availability(depths)[-1].tolist()
    room.heard.clear()


def test_both_backends_say_the_same(bundle: SmallBundle, clips: dict[str, Clip]) -> None:
    clip = clips["prompt-password"]
    found = []
    for backend in BACKENDS:
        room = Room(bundle.path, backend)
        session = room.engine.open(replace(options(clip), beam=3))
        found.append(room.play(session, whole(clip.samples, clip.rate, "random")))
    assert found[0].words() == found[1].words()
    assert np.abs(found[0].encoded - found[1].encoded).max() < CLOSE


def test_what_a_loaded_engine_says_of_itself(room: Room, bundle: SmallBundle) -> None:
    engine, info = room.engine, room.engine.info
    assert (engine.name, engine.model, engine.slots, engine.max_batch) == ("ancat", "small", 6, 6)
    assert info.backend in BACKENDS
    assert (info.version, info.precision, info.license) == ("1.0.0", "fp32", "Apache-2.0")
    assert info.frame_seconds == 0.04
    assert info.max_lookahead_ms == bundle.config.layers * bundle.config.right * 40
    assert info.front_end_lookahead_ms == 15
    assert info.max_utterance_ms == 30_000
    assert engine.cache_bytes > 0


def test_slots_are_exhausted_and_come_back(room: Room) -> None:
    sessions = [room.engine.open(SpeechOptions()) for _ in range(room.engine.slots)]
    assert room.engine.free_slots == 0
    checkpoint = sessions[0].export()
    with pytest.raises(SlotsExhausted):
        room.engine.open(SpeechOptions())
    with pytest.raises(SlotsExhausted):
        room.engine.restore(checkpoint)
    for session in sessions:
        session.close()
        session.close()
    assert room.engine.free_slots == room.engine.slots


@pytest.mark.parametrize(
    "wrong",
    [
        SpeechOptions(beam=0),
        SpeechOptions(beam=9),
        SpeechOptions(sample_rate=7999),
        SpeechOptions(sample_rate=48001),
    ],
)
def test_options_that_cannot_be_served_take_no_slot(room: Room, wrong: SpeechOptions) -> None:
    with pytest.raises(ValueError, match=r"beam|rate"):
        room.engine.open(wrong)
    assert room.engine.free_slots == room.engine.slots


def test_a_failure_in_opening_leaks_no_slot(
    bundle: SmallBundle, clips: dict[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(bundle.path, slots=1, max_batch=1)
    checkpoint = engine.open(SpeechOptions()).export()

    def fails(*_: object) -> None:
        raise MemoryError

    for method in ("zero", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(type(engine._rows), method, fails)
            with pytest.raises(MemoryError):
                engine.open(SpeechOptions()) if method == "zero" else engine.restore(checkpoint)
        assert engine.free_slots == 1
    engine.open(SpeechOptions()).close()
    assert engine._pool.leaked_total == 1  # the one session that this test itself dropped, none of the failed


def test_a_step_that_breaks_loses_who_was_in_it_and_says_so(
    room: Room, clips: dict[str, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that the encoder never saw must not be missing in silence."""
    engine, clip = room.engine, clips["coffee-mocha"]
    broken, other = (engine.open(options(clip)) for _ in range(2))
    sound = Audio(clip.samples[: clip.rate], 0.0)
    for session in (broken, other):
        session.push(sound)

    class Breaking:
        def run(self, feeds: object) -> dict[str, np.ndarray]:
            raise ProgramError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_encoder", Breaking())
        with pytest.raises(ProgramError, match="no memory"):
            engine.step([broken], ignore)
    # It asks for a step, which says why it is lost, as often as it is asked.
    for _ in range(2):
        assert broken.runnable()
        with pytest.raises(ProgramError, match="no memory"):
            engine.step([other, broken], ignore)
        with pytest.raises(ProgramError, match="no memory"):
            broken.export()
        broken.push(sound)
    assert other.backlog() > 0, "who was not in the step has lost nothing"
    room.drain(other)
    assert other.backlog() == 0
    for session in (broken, other):
        session.close()
        assert not session.runnable()


def test_a_step_tells_how_long_its_stages_took(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["digit-three"]
    stages: list[tuple[str, int]] = []
    sessions = [room.engine.open(options(clip)) for _ in range(2)]
    for session in sessions:
        session.push(Audio(clip.samples, 0.0))

    def on_stage(stage: str, seconds: float, batch: int) -> None:
        assert seconds >= 0
        stages.append((stage, batch))

    room.engine.step(sessions, on_stage)
    assert stages == [("features", 2), ("encoder", 2), ("decoder", 2)]
    for session in sessions:
        session.close()


def test_a_slot_remembers_nothing_of_its_last_stream(room: Room, clips: dict[str, Clip]) -> None:
    found = []
    for name in ("digit-three", "wake-alexa", "digit-three"):
        clip = clips[name]
        session = room.engine.open(options(clip))
        heard = room.play(session, whole(clip.samples, clip.rate, "37 ms"))
        found.append((session.slot, heard.encoded, heard.finals))
        session.close()
        room.heard.clear()
    assert found[0][0] == found[1][0] == found[2][0]
    np.testing.assert_array_equal(found[0][1], found[2][1])
    assert found[0][2] == found[2][2]


def test_deadlines_and_backlog(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["wake-alexa"]
    session = room.engine.open(options(clip))
    assert not session.runnable()
    session.push(Audio(clip.samples[:320], 10.0))
    assert not session.runnable()  # no frame is complete
    session.push(Audio(clip.samples[320:16000], 20.0))
    assert session.runnable()
    assert session.backlog() == 24
    assert session.deadline() == pytest.approx(20.05)
    room.engine.step([session], ignore)
    assert session.backlog() == 24 - room.engine._model.step_frames
    session.close()
    assert not session.runnable()


def test_a_session_is_full_when_more_audio_would_not_be_in_its_step(
    room: Room, clips: dict[str, Clip]
) -> None:
    clip, frames = clips["wake-alexa"], room.engine._model.step_frames

    def audio(first: int, last: int, due: float = 0.0) -> Audio:
        """What completes frames `first` to `last`, exclusive."""
        return Audio(clip.samples[640 * first + 240 : 640 * last + 240], due)

    session = room.engine.open(options(clip))
    assert not session.full()
    session.push(Audio(clip.samples[:240], 0.0))
    session.push(audio(0, frames - 1))
    assert session.runnable()
    assert not session.full()
    session.push(audio(frames - 1, frames))
    assert session.full()
    room.engine.step([session], ignore)
    assert not session.full()
    # Ahead of the clock: a frame is enough.
    session.push(audio(frames, frames + 1, time.monotonic() + 1000))
    assert session.runnable()
    assert session.full()
    room.engine.step([session], ignore)
    session.push(Flush("now"))
    assert session.full()  # what follows it is held back until its step is over
    room.engine.step([session], ignore)
    assert not session.full()
    session.close()
    assert not session.full()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder", {"dims": 3}, "no field 'dims'"),
        ("encoder", {"dim": 33, "heads": 2}, "multiple"),
        ("step_frames", "many", "architecture"),
        ("frontend", {"bins": 1}, "architecture"),
        ("word_times", {"middle": 1}, "architecture"),
        ("search", {"repeat_gain": -1.0}, "repeat_gain must be finite"),
        ("search", {"repeat_frames": 0}, "repeat_frames and context_frames at least 1"),
        ("search", {"gain": 1.0}, "architecture"),
    ],
)
def test_a_manifest_that_makes_no_sense(
    tmp_path: Path, bundle: SmallBundle, field: str, value: object, message: str
) -> None:
    path = shutil.copytree(bundle.path, tmp_path / "copy")
    manifest = yaml.safe_load((path / "manifest.yaml").read_text())
    manifest["architecture"][field] = value
    (path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(BundleError, match=message):
        load(path, slots=1, max_batch=1)


def test_a_precision_that_the_bundle_lacks(bundle: SmallBundle) -> None:
    with pytest.raises(BundleError, match="precision must be one of float32"):
        load(bundle.path, slots=1, max_batch=1, precision="int8")


def test_long_silence_and_many_utterances(room: Room, clips: dict[str, Clip]) -> None:
    """Rings wrap many times, utterances end by themselves, and the stream is still exact."""
    clip = clips["wake-smart-mirror"]
    long = np.concatenate([clip.samples, np.zeros(16000, np.float32)] * 3)
    rules = EndpointRules(likely_silence_ms=120, final_silence_ms=280, max_utterance_ms=1500)
    found = []
    for chunk in ("37 ms", "all at once"):
        session = room.engine.open(replace(options(clip), endpointing=rules))
        found.append(room.play(session, whole(long, clip.rate, chunk)))
        session.close()
    assert found[0].words() == found[1].words()
    assert [f.utterance for f in found[0].finals] == list(range(len(found[0].finals)))
    assert len(found[0].finals) >= 3
    assert np.abs(found[0].encoded - found[1].encoded).max() < CLOSE
    room.heard.clear()
