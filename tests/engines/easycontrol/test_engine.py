"""Sessions of images: batches, the cache of conditions, cancelling, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from realtide.engines.easycontrol.session import unpack
from realtide.engines.easycontrol.types import (
    Applied,
    Cancel,
    Cancelled,
    Conditioned,
    Finish,
    Forget,
    Generate,
    Image,
    ImageOptions,
    Preview,
    Progress,
)
from realtide.engines.engine import CheckpointMismatch, SlotsExhausted
from tests.engines.easycontrol.small import EACH, WANTED, Small, alone, condition, images

SKETCH, MAP, SUBJECT = ("sketch", "canny", 1), ("map", "depth", 2), ("who", "subject", 3)


@pytest.fixture
def small() -> Iterator[Small]:
    made = Small()
    yield made
    made.engine.close()


def near(have: object, want: object) -> None:
    """Pixels that differ by rounding alone."""
    np.testing.assert_allclose(np.asarray(have, int), np.asarray(want, int), atol=1)


def test_an_image_with_everything_that_is_told(small: Small) -> None:
    session = small.open(SKETCH, SUBJECT)
    assert not session.runnable()
    session.push(replace(WANTED, conditions=(("sketch", 1.0), ("who", 0.5)), preview_interval=1))
    session.push(Finish())
    events = small.play(session)[session]
    assert session.done
    assert isinstance(events[0], Applied)
    assert (events[0].control_id, events[0].position) == ("one", 0)
    found = next(event for event in events if isinstance(event, Conditioned))
    assert (found.hits, found.misses) == (0, 2)
    steps = [(event.step, event.steps) for event in events if isinstance(event, Progress)]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(p.step, p.width, p.height) for p in previews] == [(1, 16, 12), (2, 16, 12)]
    assert previews[0].data.std() > 1
    (image,) = images(events)
    assert isinstance(events[-1], Image)
    assert image.data.shape == (24, 32, 3)
    assert (image.position, image.control_id, image.seed) == (0, "one", 7)
    stages = [stage for stage, _ in small.stages]
    assert stages.count("condition") == 2
    assert stages.count("denoise") == 3
    assert stages.count("preview") == 2
    assert stages.count("vae") == 3
    session.close()
    assert (small.engine.free_slots, small.store.held) == (4, 0)


def test_requests_together_are_each_alone(small: Small) -> None:
    cases = [
        ((SKETCH,), replace(WANTED, conditions=(("sketch", 1.0),))),
        ((MAP,), replace(WANTED, conditions=(("map", 0.7),), seed=8, steps=5)),
        ((SUBJECT,), replace(WANTED, conditions=(("who", 1.0),), prompt="a frog", guidance=2.0)),
        ((), replace(WANTED, prompt="a frog")),
    ]
    sessions = []
    for conditions, wanted in cases:
        sessions.append(small.open(*conditions))
        sessions[-1].push(wanted)
        sessions[-1].push(Finish())
    events = small.play(*sessions)
    assert ("denoise", 3) in small.stages
    for session, (conditions, wanted) in zip(sessions, cases, strict=True):
        near(images(events[session])[0].data, alone(conditions, wanted))


def test_a_condition_is_paid_for_once(small: Small) -> None:
    session = small.open(SKETCH)
    wanted = replace(WANTED, conditions=(("sketch", 1.0),))
    session.push(wanted)
    session.push(replace(wanted, control_id="seed", seed=8))
    session.push(replace(wanted, control_id="prompt", prompt="a frog"))
    session.push(replace(wanted, control_id="weight", conditions=(("sketch", 0.5),)))
    session.push(replace(wanted, control_id="size", width=24))
    session.push(Finish())
    events = small.play(session)[session]
    found = [(event.hits, event.misses) for event in events if isinstance(event, Conditioned)]
    # Another seed costs nothing; a pooled prompt, a weight and a size each make other keys.
    assert found == [(0, 1), (1, 0), (0, 1), (0, 1), (0, 1)]
    # The latents of the condition image are kept with it: one encoding, five decodings.
    assert [stage for stage, _ in small.stages].count("vae") == 1 + 5
    assert len({image.data.tobytes() for image in images(events)}) == 5
    other = small.open(("mine", "canny", 1))
    other.push(replace(WANTED, conditions=(("mine", 1.0),), seed=3))
    told = small.play(other)[other]
    # The same picture in another session has the same keys and values.
    assert any(isinstance(event, Conditioned) and event.hits == 1 for event in told)


def test_a_subject_does_not_depend_on_the_size(small: Small) -> None:
    session = small.open(SUBJECT)
    session.push(replace(WANTED, conditions=(("who", 1.0),)))
    session.push(replace(WANTED, control_id="two", conditions=(("who", 1.0),), width=24, height=40))
    events = small.play(session)[session]
    assert [event.hits for event in events if isinstance(event, Conditioned)] == [0, 1]


def test_what_is_replaced_or_forgotten_stays_for_requests_before(small: Small) -> None:
    session = small.open(SKETCH)
    wanted = replace(WANTED, conditions=(("sketch", 1.0),))
    session.push(wanted)
    session.push(condition("sketch", "canny", 9))
    session.push(replace(wanted, control_id="two"))
    assert session.push(Forget("drop", "sketch")) == [Applied("drop", 2)]
    with pytest.raises(KeyError):
        session.push(replace(wanted, control_id="three"))
    made = images(small.play(session)[session])
    near(made[0].data, alone((SKETCH,), wanted))
    near(made[1].data, alone((("sketch", "canny", 9),), wanted))
    assert not np.array_equal(made[0].data, made[1].data)


def test_a_hundred_mixed_requests_in_a_cache_for_three() -> None:
    little, ample = Small(slots=5, conditions=3), Small(slots=1, conditions=64)
    rng = np.random.default_rng(0)
    kinds = ("canny", "depth", "subject")
    sessions = [little.open(*((f"c{n}", kinds[n % 3], n) for n in range(6))) for _ in range(5)]
    asked: list[tuple[int, Generate]] = []
    for number in range(100):
        chosen = rng.choice(6, rng.integers(0, 3), replace=False)
        wanted = Generate(
            f"r{number}",
            ("a frog", "a red apple")[number % 2],
            *((32, 24), (24, 32))[int(rng.integers(2))],
            steps=2,
            guidance=3.5,
            seed=number,
            conditions=tuple((f"c{n}", (1.0, 0.5)[int(rng.integers(2))]) for n in chosen),
        )
        asked.append((number % 5, wanted))
        sessions[number % 5].push(wanted)
    events = little.play(*sessions)  # holds the budget after every step
    made = {image.control_id: image for session in sessions for image in images(events[session])}
    assert len(made) == 100
    assert little.store.evicted > 20
    assert little.store.hits > 5
    check = ample.open(*((f"c{n}", kinds[n % 3], n) for n in range(6)))
    for _, wanted in asked[::7]:
        check.push(wanted)
    for image in images(ample.play(check)[check]):
        near(made[image.control_id].data, image.data)
    for session in sessions:
        session.close()
    assert little.store.held == 0
    assert little.store.nbytes <= 3 * EACH
    little.engine.close()
    ample.engine.close()


def test_sessions_wait_for_memory_and_none_for_ever() -> None:
    small = Small(conditions=2)
    first, second = small.open(SKETCH, SUBJECT), small.open(MAP)
    first.push(replace(WANTED, conditions=(("sketch", 1.0), ("who", 1.0))))
    second.push(replace(WANTED, conditions=(("map", 1.0),)))
    for _ in range(2):
        small.engine.step([first], small.on_stage)
    small.engine.step([second], small.on_stage)
    assert not second.runnable()
    small.woken.clear()
    events = small.play(first, until=lambda: first.current is None)
    assert second in small.woken
    assert second.runnable()
    both = small.play(first, second)
    assert len(images(events[first]) + images(both[first])) == 1
    assert len(images(both[second])) == 1
    small.engine.close()


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_cancelling_gives_memory_back(small: Small, steps: int) -> None:
    session = small.open(SKETCH)
    session.push(replace(WANTED, conditions=(("sketch", 1.0),), steps=8))
    session.push(replace(WANTED, control_id="next"))
    events = [event for _ in range(steps) for event in small.engine.step([session], small.on_stage)[0]]
    events += session.push(Cancel("stop", "one"))
    assert [event for event in events if not isinstance(event, Progress | Conditioned)] == [
        Applied("one", 0), Applied("stop", 0), Cancelled(0, "one"),
    ]  # fmt: skip
    assert small.store.held == 0
    made = images(small.play(session)[session])
    assert [image.position for image in made] == [1]
    near(made[0].data, alone((), WANTED))
    assert session.push(Cancel("late", "one")) == [Applied("late", 2)]


def test_closing_in_the_middle_gives_everything_back(small: Small) -> None:
    session = small.open(SKETCH)
    session.push(replace(WANTED, conditions=(("sketch", 1.0),), preview_interval=1))
    for _ in range(4):
        small.engine.step([session], small.on_stage)
    assert small.store.held == 1
    session.close()
    session.close()
    assert (small.engine.free_slots, small.store.held) == (4, 0)
    assert not session.runnable()


def test_slots_are_finite() -> None:
    small = Small(slots=1)
    session = small.open()
    with pytest.raises(SlotsExhausted):
        small.open()
    session.close()
    small.open().close()
    small.engine.close()


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_an_exported_session_goes_on_with_the_same_image(small: Small, steps: int) -> None:
    wanted = replace(WANTED, conditions=(("sketch", 1.0), ("who", 0.5)), steps=4, preview_interval=1)
    session = small.open(SKETCH, SUBJECT)
    session.push(wanted)
    session.push(replace(wanted, control_id="later"))
    for _ in range(steps):
        small.engine.step([session], small.on_stage)
    session.settle()
    state = session.export()
    session.close()
    other = Small()
    again = other.engine.restore(state, ImageOptions())
    again.push(Finish())
    made = images(other.play(again)[again])
    assert [image.control_id for image in made] == ["one"]  # the other one the client asks for again
    near(made[0].data, alone((SKETCH, SUBJECT), wanted))
    other.engine.close()


def test_a_session_without_an_image_under_way_has_a_small_state(small: Small) -> None:
    session = small.open(SKETCH)
    state = session.export()
    assert len(state) < 1000
    again = small.engine.restore(state, ImageOptions(start=5))
    again.push(WANTED)
    again.push(Finish())
    assert [image.position for image in images(small.play(again)[again])] == [5]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.update(width=30),
        lambda image: image.update(step=9),
        lambda image: image.update(position=4),
        lambda image: image["conditions"].append(["canny", 1.0]),
        lambda image: image["conditions"][0].__setitem__(0, "pose"),
        lambda image: image.pop("seed"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_slot_comes_back(small: Small, change: object) -> None:
    import json

    from safetensors.numpy import load, save

    session = small.open(SKETCH)
    session.push(replace(WANTED, conditions=(("sketch", 1.0),)))
    for _ in range(4):
        small.engine.step([session], small.on_stage)
    state = session.export()
    plain = dict(unpack(state).plain)
    change(plain["image"])  # type: ignore[operator]
    bad = save(load(state), {"session": json.dumps(plain)})
    with pytest.raises(CheckpointMismatch, match="damaged"):
        small.engine.restore(bad, ImageOptions())
    for broken in (b"", state[:40], save({"x": np.zeros(1)}, {"session": "{}"})):
        with pytest.raises(CheckpointMismatch, match="damaged"):
            small.engine.restore(broken, ImageOptions())
    with pytest.raises(CheckpointMismatch, match="format 9"):
        small.engine.restore(
            save(load(state), {"session": json.dumps(plain | {"format": 9})}), ImageOptions()
        )
    assert small.engine.free_slots == 3


def test_what_fails_beside_steps_ends_the_session_only(small: Small) -> None:
    def broken(pixels: object) -> object:
        raise OSError("disk")

    session, other = small.open(encode=broken), small.open()
    session.push(WANTED)
    other.push(WANTED)
    with pytest.raises(OSError, match="disk"):
        small.play(session)
    session.close()
    assert len(images(small.play(other)[other])) == 1


def test_a_step_that_failed_loses_no_receipt(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor repeats such a step for each session alone."""
    parts = small.engine._parts
    sessions = [small.open(), small.open()]
    for session in sessions:
        session.push(WANTED)

    def broken(*arguments: object) -> object:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "prompt", broken)
        with pytest.raises(OSError, match="no memory"):
            small.engine.step(sessions[:1], small.on_stage)
    small.play(*sessions, until=lambda: all(s.current is not None and s.current.ready for s in sessions))
    again = [small.open(), small.open()]
    for session in again:
        session.push(WANTED)
        receipt, ready = small.engine.step([session], small.on_stage)[0]
        assert receipt == Applied("one", 0)
        assert isinstance(ready, Conditioned)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "velocities", broken)
        with pytest.raises(OSError, match="no memory"):
            small.engine.step(again, small.on_stage)
    assert [session.current.step for session in again if session.current is not None] == [0, 0]
    events = small.play(*again)
    assert [len(images(events[session])) for session in again] == [1, 1]
