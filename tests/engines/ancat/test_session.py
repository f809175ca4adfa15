"""Sessions: controls at their frame, flush and finish, checkpoints bit for bit, damage refused."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from realtide.engines.ancat.session import SpeechSession, changed
from realtide.engines.ancat.types import (
    Applied,
    Audio,
    EndpointEvent,
    EndpointRules,
    Finish,
    Flush,
    Partial,
    PhraseBoost,
    SetBoosts,
    SetEndpointing,
    SetInterim,
    SetLookahead,
    SpeechInput,
    SpeechOptions,
)
from realtide.engines.engine import CheckpointMismatch
from tests.engines.ancat.conftest import Clip, SmallBundle
from tests.engines.ancat.oracle import Dial, Oracle
from tests.engines.ancat.playing import Heard, Room, pieces, whole

CLOSE = 1e-4
NO_ENDS = EndpointRules(enabled=False)


@pytest.fixture(scope="module")
def room(bundle: SmallBundle) -> Room:
    return Room(bundle.path)


@pytest.fixture(autouse=True)
def every_slot_comes_back(room: Room) -> object:
    room.heard.clear()
    yield
    assert room.engine.free_slots == room.engine.slots
    assert room.engine._pool.leaked_total == 0


def alike(one: Heard, two: Heard) -> None:
    assert one.words() == two.words()
    assert one.applied == two.applied
    assert one.available == two.available
    assert np.abs(one.encoded - two.encoded).max() < CLOSE


def split_at(clip: Clip, samples: Sequence[int], controls: Sequence[SpeechInput]) -> list[SpeechInput]:
    """Audio with controls after so many samples, and the end."""
    inputs: list[SpeechInput] = []
    at = 0
    for position, control in zip(samples, controls, strict=True):
        inputs += [Audio(clip.samples[at:position], 0.0), control]
        at = position
    return [*inputs, Audio(clip.samples[at:], 0.0), Finish()]


def finely(inputs: Sequence[SpeechInput], size: int) -> list[SpeechInput]:
    """The same with audio cut into small pieces."""
    out: list[SpeechInput] = []
    for item in inputs:
        if isinstance(item, Audio):
            out += [Audio(item.samples[k : k + size], 0.0) for k in range(0, len(item.samples), size)]
        else:
            out.append(item)
    return out


def test_controls_take_effect_at_their_frame_however_steps_are_batched(
    room: Room, bundle: SmallBundle, clips: dict[str, Clip]
) -> None:
    clip = clips["wake-alexa"]
    at = (8001, 12000, 12000, 17777)
    controls = (
        SetLookahead("all", bias=6.0),
        SetLookahead("none", max_lookahead_ms=0),
        SetLookahead("free", max_lookahead_ms=-1),
        SetLookahead("less", bias=-1.0, max_lookahead_ms=130),
    )
    inputs = split_at(clip, at, controls)
    options = SpeechOptions(endpointing=NO_ENDS)
    found = []
    for given, lazy in (
        (inputs, False),
        (inputs, True),
        (finely(inputs, 160), False),
        (finely(inputs, 999), True),
    ):
        session = room.engine.open(options)
        found.append(room.play(session, given, lazy=lazy))
        session.close()
    for other in found[1:]:
        alike(found[0], other)
    assert found[0].applied == [Applied(c.control_id, n) for c, n in zip(controls, at, strict=True)]

    # The frames that are complete when a control arrives go the old way: the window of frame i ends 240
    # samples after its own 640.
    starts = [(n - 240) // 640 for n in at]
    dials = [(0, Dial()), (starts[0], Dial(6.0)), (starts[2], Dial(6.0)), (starts[3], Dial(-1.0, 3))]

    def dial(frame: int) -> Dial:
        return [d for first, d in dials if first <= frame][-1]

    windows = bundle.windows(clip)
    oracle = Oracle(bundle.model.encoder).feed(windows, dial, final=True)
    assert found[0].available == oracle.available
    assert np.abs(found[0].encoded - oracle.output.numpy()).max() < CLOSE


def test_other_controls_change_what_follows(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["librispeech-begin"]
    rules = EndpointRules(max_utterance_ms=600)
    inputs = split_at(
        clip, (16000, 32000), (SetInterim("quiet", enabled=False), SetEndpointing("short", rules))
    )
    found = []
    for lazy in (False, True):
        session = room.engine.open(SpeechOptions(endpointing=NO_ENDS))
        found.append(room.play(session, inputs, lazy=lazy))
        session.close()
    alike(*found)
    events = found[0].events
    quiet, short = (events.index(Applied(name, n)) for name, n in (("quiet", 16000), ("short", 32000)))
    assert any(isinstance(event, Partial) for event in events[:quiet])
    assert not any(isinstance(event, Partial) for event in events[quiet:])
    assert not any(isinstance(event, EndpointEvent) and event.kind == "end" for event in events[:short])
    assert sum(f.reason == "max_length" for f in found[0].finals) >= 2


def test_boosted_phrases_win_from_their_frame_on(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["librispeech-begin"]
    boosts = (PhraseBoost(("coffee", "seven"), 9.0),)
    found = []
    for inputs in (
        whole(clip.samples, clip.rate, "37 ms"),
        split_at(clip, (0,), (SetBoosts("now", boosts),)),
    ):
        session = room.engine.open(SpeechOptions(endpointing=NO_ENDS, beam=4))
        found.append(room.play(session, inputs))
        session.close()
    session = room.engine.open(SpeechOptions(endpointing=NO_ENDS, beam=4, boosts=boosts))
    given = room.play(session, whole(clip.samples, clip.rate, "37 ms"))
    session.close()
    assert found[0].words() != found[1].words()
    assert found[1].words() == given.words()


def test_flush_cuts_and_goes_on(room: Room, bundle: SmallBundle, clips: dict[str, Clip]) -> None:
    clip = clips["wake-alexa"]
    at = (9000, 9000, 20000)
    inputs = split_at(clip, at, (Flush("one"), Flush("two"), Flush("three")))
    found = []
    for given, lazy in (
        (inputs, False),
        (inputs, True),
        (finely(inputs, 370), False),
        (finely(inputs, 370), True),
    ):
        session = room.engine.open(SpeechOptions(endpointing=NO_ENDS, lookahead_bias=3.0))
        found.append(room.play(session, given, lazy=lazy))
        session.close()
    for other in found[1:]:
        alike(found[0], other)
    assert found[0].applied == [Applied(n, s) for n, s in zip(("one", "two", "three"), at, strict=True)]
    assert [f.reason for f in found[0].finals] == ["flush", "flush", "flush", "finish"]
    assert found[0].finals[0].end == pytest.approx(9000 / 16000, abs=0.05)
    assert found[0].finals[3].audio_processed <= len(clip.samples) / 16000 + 1e-6
    assert len({f.utterance for f in found[0].finals}) == 4


def test_what_follows_a_flush_waits_for_its_step(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["digit-three"]
    session = room.engine.open(SpeechOptions(sample_rate=clip.rate))
    room.push(session, Audio(clip.samples[:1000], 0.0))
    room.push(session, Flush("cut"))
    room.push(session, SetInterim("later", enabled=False))
    room.push(session, Audio(clip.samples[1000:], 0.0))
    before = session.options
    assert before.interim_results
    assert room.of(session).applied == []
    room.drain(session)
    assert room.of(session).applied == [Applied("cut", 1000), Applied("later", 1000)]
    assert session.options == replace(before, interim_results=False)
    session.close()


def test_finish_ends_the_stream_once(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["digit-seven"]
    session = room.engine.open(SpeechOptions(sample_rate=clip.rate))
    heard = room.play(session, whole(clip.samples, clip.rate, "37 ms"))
    assert session.done
    assert [f.reason for f in heard.finals] == ["finish"]
    with pytest.raises(ValueError, match="after finish"):
        session.push(Audio(clip.samples, 0.0))
    assert not session.runnable()
    session.close()


def test_audio_right_after_finish_is_refused_before_any_step(room: Room) -> None:
    session = room.engine.open(SpeechOptions())
    session.push(Finish())
    with pytest.raises(ValueError, match="after finish"):
        session.push(Audio(np.zeros(10, np.float32), 0.0))
    session.close()


@pytest.mark.parametrize("samples", [0, 1, 639, 640, 880, 881])
def test_hardly_any_audio(room: Room, samples: int) -> None:
    session = room.engine.open(SpeechOptions())
    heard = room.play(session, [Audio(np.zeros(samples, np.float32), 0.0), Flush("f"), Finish()])
    assert session.done
    assert heard.applied == [Applied("f", samples)]
    assert len(heard.available) == -(-samples // 640)
    session.close()


def test_closing_twice_and_using_a_closed_session(room: Room, clips: dict[str, Clip]) -> None:
    first, second = room.engine.open(SpeechOptions()), room.engine.open(SpeechOptions())
    first.push(Audio(clips["wake-alexa"].samples, 0.0))
    first.close()
    third = room.engine.open(SpeechOptions())  # has the slot now
    first.close()
    assert room.engine.free_slots == room.engine.slots - 2
    assert first.done
    assert not first.runnable()
    assert first.push(Audio(np.zeros(10, np.float32), 0.0)) == ()
    with pytest.raises(ValueError, match="closed"):
        first.export()
    for session in (second, third):
        session.close()


def resumed(room: Room, session: SpeechSession) -> SpeechSession:
    """Moves a session into another slot by its checkpoint."""
    checkpoint = session.export()
    assert session.export() == checkpoint  # exporting changes nothing
    other = room.engine.restore(checkpoint)
    session.close()
    return other


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("name", ["wake-alexa", "prompt-password"])
def test_resuming_goes_on_bit_for_bit(room: Room, clips: dict[str, Clip], name: str, beam: int) -> None:
    clip = clips[name]
    inputs = whole(clip.samples, clip.rate, "37 ms")
    options = SpeechOptions(
        sample_rate=clip.rate,
        lookahead_bias=2.0,
        beam=beam,
        endpointing=EndpointRules(final_silence_ms=320),
        boosts=(PhraseBoost(("three",), 1.0),),
    )
    session = room.engine.open(options)
    straight = room.play(session, inputs)
    session.close()
    session = room.engine.open(options)
    slots, parts = [session.slot], []
    for k, item in enumerate(inputs):
        if k % 11 == 5:
            parts.append(room.of(session))
            session = resumed(room, session)
            room.heard.pop(session, None)
            slots.append(session.slot)
        room.play(session, [item])
    parts.append(room.of(session))
    session.close()
    assert len(set(slots)) > 1
    assert [event for part in parts for event in part.events] == straight.events
    rows = [row for part in parts for row in part.rows]
    np.testing.assert_array_equal(np.concatenate(rows), straight.encoded)
    assert [a for part in parts for a in part.available] == straight.available


def test_resuming_in_another_process_of_the_same_bundle(
    room: Room, bundle: SmallBundle, clips: dict[str, Clip]
) -> None:
    clip = clips["wake-alexa"]
    twin = Room(bundle.path, slots=2)
    session = room.engine.open(SpeechOptions())
    room.play(session, [Audio(clip.samples[:10_007], 0.0)])
    moved = twin.engine.restore(session.export())
    rest: list[SpeechInput] = [Audio(clip.samples[10_007:], 0.0), Finish()]
    one, two = Heard(), twin.of(moved)
    room.heard[session] = one
    room.play(session, rest)
    twin.play(moved, rest)
    assert one.events == two.events
    np.testing.assert_array_equal(one.encoded, two.encoded)
    session.close()
    moved.close()


def test_resuming_with_other_options(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["digit-three"]
    session = room.engine.open(SpeechOptions(sample_rate=clip.rate))
    room.play(session, [Audio(clip.samples[:2000], 0.0)])
    checkpoint = session.export()
    session.close()
    other = room.engine.restore(checkpoint, SpeechOptions(sample_rate=48000, lookahead_bias=6.0))
    assert other.options.lookahead_bias == 6.0
    assert other.options.sample_rate == clip.rate  # of the audio that is under way
    other.close()
    with pytest.raises(ValueError, match="beam"):
        room.engine.restore(checkpoint, SpeechOptions(beam=2))


def test_what_has_not_taken_effect_is_not_in_a_checkpoint(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["wake-alexa"]
    pending: tuple[SpeechInput, ...] = (SetLookahead("wide", bias=6.0), Flush("cut"), Finish())
    for control in pending:
        session = room.engine.open(SpeechOptions())
        room.push(session, Audio(clip.samples[:9000], 0.0))
        room.push(session, control)  # frames are complete that no step has taken
        assert room.of(session).applied == []
        other = room.engine.restore(session.export())
        session.close()
        assert other.options.lookahead_bias == 0.0
        rest: list[SpeechInput] = [control, Audio(clip.samples[9000:], 0.0), Finish()]
        if isinstance(control, Finish):
            rest = [control]
        again = room.play(other, rest)  # whoever resumes sends it again
        other.close()
        straight = room.engine.open(SpeechOptions())
        wanted = room.play(straight, [Audio(clip.samples[:9000], 0.0), *rest])
        straight.close()
        alike(again, wanted)
        room.heard.clear()


def test_audio_behind_a_flush_is_in_the_checkpoint(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["wake-alexa"]
    session = room.engine.open(SpeechOptions())
    for item in (Audio(clip.samples[:9000], 0.0), Flush("cut"), Audio(clip.samples[9000:], 0.0)):
        room.push(session, item)
    other = room.engine.restore(session.export())
    session.close()
    heard = room.play(other, [Finish()])
    other.close()
    assert len(heard.available) == -(-len(clip.samples) // 640)


def test_a_finished_stream_resumes_as_finished(room: Room, clips: dict[str, Clip]) -> None:
    clip = clips["digit-seven"]
    session = room.engine.open(SpeechOptions(sample_rate=clip.rate))
    room.play(session, whole(clip.samples, clip.rate, "all at once"))
    other = room.engine.restore(session.export())
    session.close()
    assert other.done
    assert not other.runnable()
    with pytest.raises(ValueError, match="after finish"):
        other.push(Audio(clip.samples, 0.0))
    other.close()


@pytest.fixture(scope="module")
def checkpoint(room: Room, clips: dict[str, Clip]) -> bytes:
    clip = clips["prompt-password"]
    session = room.engine.open(SpeechOptions(sample_rate=clip.rate, beam=2))
    for item in pieces(clip.samples[:20_005], clip.rate, "37 ms"):
        room.play(session, [item])
    data = session.export()
    session.close()
    return data


def refused(room: Room, data: bytes) -> str:
    with pytest.raises(CheckpointMismatch) as caught:
        room.engine.restore(data)
    assert room.engine.free_slots == room.engine.slots
    return str(caught.value)


def test_cut_checkpoints_are_refused(room: Room, checkpoint: bytes) -> None:
    for size in (0, 1, 7, 8, 9, 100, 1000, len(checkpoint) // 2, len(checkpoint) - 1):
        assert "damaged" in refused(room, checkpoint[:size])
    assert "damaged" in refused(room, checkpoint + b"x")
    assert "damaged" in refused(room, b"\xff" * 4000)


def test_damaged_checkpoints_never_fail_otherwise(room: Room, checkpoint: bytes) -> None:
    rng = random.Random(3)
    head = 8 + int.from_bytes(checkpoint[:8], "little")
    restored = 0
    for k in range(400):
        data = bytearray(checkpoint)
        data[rng.randrange(head if k % 2 else len(data))] ^= 1 << rng.randrange(8)
        try:
            session = room.engine.restore(bytes(data))
        except CheckpointMismatch:
            pass
        else:
            restored += 1  # a bit of the audio that is buffered, or of a number that is as good as another
            session.close()
        assert room.engine.free_slots == room.engine.slots
    assert restored < 200


def edited(checkpoint: bytes, **changes: object) -> bytes:
    """The checkpoint with other plain values; `front_x` changes the front end's."""
    size = int.from_bytes(checkpoint[:8], "little")
    plain = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["session"])
    for name, value in changes.items():
        target = plain["front"] if name.startswith("front_") else plain
        target[name.removeprefix("front_")] = value
    return save_tensors(load_tensors(checkpoint), {"session": json.dumps(plain)})


def test_checkpoints_of_another_format_or_model(room: Room, checkpoint: bytes) -> None:
    assert "format 1" in refused(room, edited(checkpoint, format=1))
    for changes in (
        {"front_sample_rate": 0},
        {"front_units": 3},
        {"front_units": 1e400},
        {"front_pushed": None},
        {"silence": "long"},
        {"silence": 1e400},
        {"front": 3},
    ):
        refused(room, edited(checkpoint, **changes))
    tensors = load_tensors(checkpoint)
    for name in tensors:
        if name != "held":
            refused(room, save_tensors(tensors | {name: tensors[name][:-1]}, metadata(checkpoint)))
        refused(room, save_tensors({k: v for k, v in tensors.items() if k != name}, metadata(checkpoint)))
    rows = np.frombuffer(tensors["rows"].tobytes().replace(b'"key_0"', b'"kez_0"'), np.uint8)
    refused(room, save_tensors(tensors | {"rows": rows}, metadata(checkpoint)))
    room.engine.restore(checkpoint).close()


def metadata(checkpoint: bytes) -> dict[str, str]:
    size = int.from_bytes(checkpoint[:8], "little")
    found: dict[str, str] = json.loads(checkpoint[8 : 8 + size])["__metadata__"]
    return found


def test_what_a_control_changes() -> None:
    options = SpeechOptions(lookahead_bias=1.0, max_lookahead_ms=200)
    assert changed(options, SetLookahead("a")) == options
    assert changed(options, SetLookahead("a", bias=2.0)) == replace(options, lookahead_bias=2.0)
    assert changed(options, SetLookahead("a", max_lookahead_ms=0)) == replace(options, max_lookahead_ms=0)
    assert changed(options, SetLookahead("a", max_lookahead_ms=-1)) == replace(options, max_lookahead_ms=None)
    assert changed(options, SetInterim("a", enabled=False)) == replace(options, interim_results=False)
    assert changed(options, SetEndpointing("a", NO_ENDS)) == replace(options, endpointing=NO_ENDS)
    boosts = (PhraseBoost(("hey",)),)
    assert changed(options, SetBoosts("a", boosts)) == replace(options, boosts=boosts)
    assert changed(options, Flush("a")) == options
