"""Video sessions: credit, prompts, pauses, checkpoints, parking, and the thread that decodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from realtide.engines.engine import CheckpointMismatch, SlotsExhausted
from realtide.engines.longlive.types import (
    Applied,
    Denoised,
    Finish,
    Frames,
    Pause,
    Play,
    PromptApplied,
    SetPrompt,
)
from tests.engines.longlive.small import BLOCK, OPTIONS, Small, credit, frames_of


@pytest.fixture
def small() -> Iterator[Small]:
    made = Small()
    yield made
    made.engine.close()


@pytest.fixture
def reference(small: Small) -> dict[int, bytes]:
    """The first 31 frames under one prompt: eight blocks, so that the window of three moves."""
    session = small.open(length=31)
    frames = frames_of(small.play(session))
    session.close()
    assert list(frames) == list(range(31))
    assert len(set(frames.values())) == 31
    return frames


def test_frames_come_in_order_each_with_all_its_pixels(small: Small) -> None:
    session = small.open(length=10)
    events = small.play(session)
    assert session.done
    frames = frames_of(events)
    assert {len(data) for data in frames.values()} == {24 * 16 * 3}
    assert [(e.first, e.count) for e in events if isinstance(e, Denoised)] == [(0, 3), (3, 4), (7, 4)]
    first = next(e for e in events if isinstance(e, (PromptApplied, Frames)))
    assert first == PromptApplied("", "one", 0, 0.0, 0)
    assert small.stages.count("denoise") == 6
    assert small.stages.count("clean_pass") == 3
    assert small.stages.count("encode") == 10
    assert small.stages.count("vae") >= 5  # a latent frame that nobody may see is not decoded


def test_credit_is_kept_to_the_frame_and_nothing_is_generated_beyond_its_block(small: Small) -> None:
    session = small.open(credit=0)
    assert not session.runnable()
    assert small.play(session) == []
    got: list[int] = []
    for position, blocks in ((1, 1), (4, 2), (5, 2), (7, 2), (8, 3)):
        assert session.push(credit(position)) == ()
        events = small.play(session)
        got += frames_of(events)
        assert got == list(range(position))
        assert session._stream.frames == 2 * blocks
        assert session.idle
    session.push(credit(2))  # an older credit that was overtaken takes nothing back
    assert session._limit == 8


def test_a_group_of_frames_is_encoded_together_and_cut_where_the_credit_ends(small: Small) -> None:
    calls: list[tuple[int, tuple[int, ...]]] = []

    def encode(first: int, frames: Any) -> int:
        calls.append((first, frames.shape))
        assert threading.current_thread().name == "frames-small"
        return first

    session = small.open(credit=4, group=4, encode=encode)
    small.play(session)
    session.push(credit(7))
    events = small.play(session)
    assert calls == [
        (0, (1, 16, 24, 3)),
        (1, (2, 16, 24, 3)),
        (3, (1, 16, 24, 3)),
        (4, (1, 16, 24, 3)),
        (5, (2, 16, 24, 3)),
    ]
    assert [e.data for e in events if isinstance(e, Frames)] == [4, 5]


def test_the_length_ends_the_session_in_the_middle_of_a_block(small: Small) -> None:
    session = small.open(length=5)
    assert list(frames_of(small.play(session))) == list(range(5))
    assert session.done
    assert not session.runnable()


def test_finish_hands_out_what_the_credit_covers(small: Small) -> None:
    session = small.open(credit=6)
    session.push(Finish())
    assert not session.done
    assert list(frames_of(small.play(session))) == list(range(6))
    assert session.done


def test_a_prompt_takes_effect_with_the_next_block_and_is_told_before_its_first_frame(
    small: Small, reference: dict[int, bytes]
) -> None:
    session = small.open(length=31)
    small.play(session, lambda: session._stream.frames == 8 and session._stream.under_way)
    assert session.push(SetPrompt("c1", "two")) == ()
    events = small.play(session)
    assert [e for e in events if isinstance(e, Applied)] == [Applied("c1", 19)]
    told = next(e for e in events if isinstance(e, PromptApplied) and e.control_id)
    assert (told.prompt, told.first, told.replayed) == ("two", 19, 4)
    assert told.recache > 0
    after = events[events.index(told) + 1 :]
    assert next(e for e in after if isinstance(e, Frames)).first == 19
    frames = frames_of(events)
    assert all(frames[index] == reference[index] for index in frames if index < 19)
    assert all(frames[index] != reference[index] for index in range(19, 31))
    assert small.stages.count("recache") == 1


@pytest.mark.parametrize(("at", "first"), [(3, 3), (4, 7), (7, 7), (8, 11)])
def test_a_prompt_for_a_frame_waits_for_the_first_block_that_begins_there(
    small: Small, at: int, first: int
) -> None:
    session = small.open(length=15)
    session.push(SetPrompt("later", "two", at))
    events = small.play(session)
    assert [e for e in events if isinstance(e, Applied)] == [Applied("later", first)]
    assert [e.first for e in events if isinstance(e, PromptApplied)] == [0, first]


def test_of_prompts_for_one_block_the_last_counts_and_all_get_their_receipt(small: Small) -> None:
    session = small.open(length=15)
    small.play(session, lambda: session._stream.frames == 2)
    session.push(SetPrompt("far", "four", 8))
    for name, prompt in (("a", "two"), ("b", "three")):
        session.push(SetPrompt(name, prompt))
    small.embedded.clear()
    events = small.play(session)
    assert [e for e in events if isinstance(e, Applied)] == [
        Applied("a", 3), Applied("b", 3), Applied("far", 11),
    ]  # fmt: skip
    assert [e.prompt for e in events if isinstance(e, PromptApplied)][-2:] == ["three", "four"]
    assert small.embedded == ["three", "four"]


def test_a_pause_holds_back_what_was_not_handed_out(small: Small, reference: dict[int, bytes]) -> None:
    session = small.open(length=31)
    before = small.play(session, lambda: session._decoding.collected >= 5)
    told = list(session.push(Pause("p")))
    position = next(e for e in told if isinstance(e, Applied)).position
    frames = frames_of([*before, *told])
    assert list(frames) == list(range(position))
    assert small.play(session) == []
    session.push(credit(10**6))
    assert small.play(session) == []
    assert session.idle
    assert session.push(Play("r")) == [Applied("r", position)]
    frames |= frames_of(small.play(session))
    assert frames == reference


def test_a_finished_session_does_not_wait_for_the_end_of_a_pause(small: Small) -> None:
    session = small.open()
    small.play(session, lambda: session._decoding.collected >= 2)
    session.push(Pause("p"))
    session.push(Finish())
    assert session.done is True


@pytest.mark.parametrize("blocks", [1, 2, 6])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_with_its_caches_a_session_continues_bit_for_bit(
    small: Small, reference: dict[int, bytes], blocks: int, taken: int
) -> None:
    """Also in the middle of a block, and of a latent frame whose second half was held back."""
    position = BLOCK * (blocks - 1) + taken
    session = small.open(credit=position, length=31)
    frames = frames_of(small.play(session))
    while session._stream.frames < 2 * blocks or session._stream.under_way:
        small.step(session)
    small.step(session)
    assert session._stream._block is not None
    assert session.settle() == []
    checkpoint = session.export(cache=True)
    again = small.engine.restore(checkpoint, replace(OPTIONS, length=31, credit=10**6))
    resumed = small.play(again)
    assert not any(isinstance(e, PromptApplied) and e.first < position for e in resumed)
    assert frames | frames_of(resumed) == reference
    # The one that was exported goes on unchanged.
    session.push(credit(10**6))
    assert frames | frames_of(small.play(session)) == reference


@pytest.mark.parametrize("position", [0, 1, 2, 5, 9, 12, 27])
def test_without_caches_a_session_continues_as_a_recache_leaves_it(
    small: Small, reference: dict[int, bytes], position: int
) -> None:
    session = small.open(credit=position, length=31)
    frames = frames_of(small.play(session))
    session.settle()
    checkpoint = session.export()
    assert len(checkpoint) < len(session.export(cache=True)) or not position
    session.close()
    again = small.engine.restore(checkpoint, replace(OPTIONS, length=31, credit=10**6))
    frames |= frames_of(small.play(again))
    assert list(frames) == list(range(31))
    # Until the window moves a recache of all frames is what the blocks had left, up to frames of later
    # blocks that it sees; the decoder is run over all that it ever saw.
    if position < 3:
        assert frames == reference
    # What a session of the same state that is parked in place gives.
    twin = small.open(credit=position, length=31)
    small.play(twin)
    small.engine._parts.caches.give_back(twin)
    twin.park()
    assert twin.parked == (position > 0)
    twin.push(credit(10**6))
    later = frames_of(small.play(twin))
    assert list(later) == list(range(position, 31))
    if (
        position % 2 or not position
    ):  # in the middle of a latent frame the parked one still has its other half
        assert later == {index: frames[index] for index in later}


def test_a_change_of_the_prompt_that_nobody_saw_is_told_again_after_a_resume(small: Small) -> None:
    session = small.open(credit=2)
    small.play(session)
    session.push(SetPrompt("c", "two"))
    session.push(credit(4))
    small.play(session, lambda: session._stream.frames == 4)
    session.push(Pause("p"))
    assert session.settle() == []
    checkpoint = session.export()
    again = small.engine.restore(checkpoint, replace(OPTIONS, credit=20))
    assert small.play(again) == []  # it is paused, as it was
    again.push(Play("r"))
    events = small.play(again)
    told = [e for e in events if isinstance(e, PromptApplied)]
    assert [(e.control_id, e.first) for e in told] == [("c", 3)]
    assert not any(isinstance(e, Applied) for e in events)


def test_a_session_that_has_not_begun_is_exported_with_its_prompt(small: Small) -> None:
    session = small.open(credit=0)
    session.settle()
    again = small.engine.restore(session.export(), replace(OPTIONS, prompt="", credit=3))
    events = small.play(again)
    assert [e.prompt for e in events if isinstance(e, PromptApplied)] == ["one"]
    assert list(frames_of(events)) == [0, 1, 2]


def test_more_sessions_than_caches_take_turns() -> None:
    small = Small(slots=3, caches=1)
    alone = [Small(slots=1).open(seed=seed, length=15) for seed in (1, 2, 3)]
    sessions = [small.open(seed=seed, length=15) for seed in (1, 2, 3)]
    events: list[list[Any]] = [[], [], []]
    parked = 0
    while any(not session.done for session in sessions):
        ready = [n for n, session in enumerate(sessions) if session.runnable()]
        if ready:
            chosen = min(ready, key=lambda n: sessions[n].deadline())
            events[chosen] += small.step(sessions[chosen])
        for n, session in enumerate(sessions):
            events[n] += session.collect()
        parked = max(parked, small.engine.parked)
    assert parked == 2
    for got, session in zip(events, alone, strict=True):
        assert list(frames_of(got)) == list(range(15))
        del session
    assert "recache" in small.stages
    small.engine.close()


def test_an_idle_session_is_parked_rather_than_a_busy_one() -> None:
    small = Small(slots=3, caches=2)
    idle, busy = small.open(credit=3), small.open(length=15)
    small.play(idle)
    small.step(busy)
    third = small.open(length=7)
    small.step(third)
    assert (idle.parked, busy.parked) == (True, False)
    assert small.engine.parked == 1
    idle.close()
    assert small.engine.parked == 0
    small.engine.close()


def test_slots_come_back_once(small: Small) -> None:
    sessions = [small.open() for _ in range(4)]
    with pytest.raises(SlotsExhausted):
        small.open()
    for session in sessions:
        small.step(session)
        session.close()
        session.close()
        assert not session.runnable()
    assert small.engine.free_slots == 4
    frames = frames_of(small.play(small.open(length=5)))
    assert len(frames) == 5


def test_damaged_checkpoints_are_refused_and_cost_no_slot(small: Small) -> None:
    session = small.open(credit=29)
    small.play(session)
    session.settle()
    good = [session.export(), session.export(cache=True)]
    session.close()
    damaged = [b"", b"x" * 40]
    for data in good:
        damaged += [data[:30], data[:-1], data.replace(b'\\"sent\\": 29', b'\\"sent\\": 1 ')]
        damaged += [data.replace(b'\\"format\\": 1', b'\\"format\\": 7')]
    for data in damaged:
        with pytest.raises(CheckpointMismatch):
            small.engine.restore(data, OPTIONS)
    other = Small(width=8)
    for data in good:
        with pytest.raises(CheckpointMismatch):
            other.engine.restore(data, OPTIONS)
    assert (small.engine.free_slots, other.engine.free_slots) == (4, 4)
    assert all(cache.holder is None for cache in small.engine._parts.caches._caches)
    assert not small.engine._parts.caches.sessions
    with pytest.raises(ValueError, match="options are needed"):
        small.engine.restore(good[0])


def test_what_fails_in_the_worker_is_told_where_events_are_collected(small: Small) -> None:
    def encode(first: int, frames: Any) -> Any:
        if first == 2:
            raise RuntimeError("no room")
        return first

    woken: list[object] = []
    small.engine.attach(woken.append, small.on_stage)
    session, other = small.open(encode=encode), small.open(length=5)
    with pytest.raises(RuntimeError, match="no room"):
        small.play(session)
    assert session in woken
    assert "vae" in small.stages
    session.close()
    assert len(frames_of(small.play(other))) == 5


def test_frames_are_due_when_they_are_played(small: Small) -> None:
    session = small.open(credit=100, frames_per_second=10.0)
    first = session.deadline()
    small.play(session, lambda: session._stream.frames == 4)
    origin = session._clock.origin
    assert session.deadline() == pytest.approx(origin + 0.7)
    assert origin <= first  # nothing came late
    slow = small.open(credit=100, frames_per_second=1000.0)
    begun = slow._clock.origin
    small.play(slow, lambda: slow._decoding.collected >= 3)
    assert slow._clock.origin > begun  # who is late stalls the player, and is due later from then on


def test_decoding_waits_for_no_more_than_a_block(small: Small) -> None:
    gate = threading.Event()

    def encode(first: int, frames: Any) -> Any:
        gate.wait(10)
        return first

    session = small.open(encode=encode)
    while session.runnable():
        small.step(session)
    # One block waits while the other one is being handed out; nothing lies outside the window.
    assert session._stream.frames == 4
    gate.set()
    small.play(session, lambda: session._stream.frames >= 8)
    session.close()


def test_memory_of_a_session_is_what_its_arrays_have(small: Small) -> None:
    session = small.open(credit=31)
    small.play(session)
    stream = session._stream
    arrays = [
        *small.engine._parts.caches.first.keys.values(),
        *stream._cross.values(),
        stream._recent,
        stream._sink,
    ]
    arrays += [*small.engine._parts.caches.first.features.values()]
    arrays += [text for text in (stream._prompt, stream._sink_prompt) if text is not None]
    assert sum(np.asarray(a).nbytes for a in arrays) == small.engine.info.session_bytes
