"""Speech with all state on a device, by PyTorch and by plans, is speech on the processor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realtide.bundle import BundleError, Precision, load_bundle
from realtide.engines.ancat.engine import load
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.static_encoder import MOST_SIZES, PaddedJoiner, sizes_up_to
from realtide.engines.ancat.types import Flush, SetLookahead, SpeechInput, SpeechOptions
from realtide.engines.runtime.memory import HOST
from realtide.engines.runtime.plan_key import Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import ProgramError
from realtide.plan_building import BundlePlans
from tests.engines.ancat.conftest import Clip, SmallBundle
from tests.engines.ancat.playing import CHUNKS, Heard, Room, whole
from tests.engines.runtime.tensorrt_package import installed
from tests.engines.runtime.tensorrt_stand_in import HostDevice

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", "570.86")
CLOSE = 1e-4


def on_device(bundle: SmallBundle, slots: int = 6) -> Room:
    return Room(bundle.path, "torch", slots, device="cpu")


def planned(
    bundle: SmallBundle, cache: Path, slots: int = 6, precision: Precision = "float32", **more: Any
) -> Room:
    plans = BundlePlans(load_bundle(bundle.path), precision, PlanCache(cache), GPU, slots, True)
    return Room(bundle.path, "tensorrt", slots, plan_of=plans, precision=precision, **more)


def same(have: Heard, want: Heard) -> None:
    assert have.available == want.available
    assert np.abs(have.encoded - want.encoded).max() < CLOSE
    assert have.words() == want.words()
    assert want.words()


def together(room: Room, clips: dict[str, Clip], chunk: str) -> list[Heard]:
    """Streams that start and stop while others go on, with dials of their own that are turned."""
    sessions: list[SpeechSession] = []
    queues: list[list[SpeechInput]] = []
    for number, clip in enumerate(clips.values()):
        inputs = whole(clip.samples, clip.rate, chunk, seed=number)
        cap = (None, 240, 0)[number % 3]
        options = SpeechOptions(
            sample_rate=clip.rate, lookahead_bias=(0.0, 3.0, -1.0)[number % 3], max_lookahead_ms=cap
        )
        if number % 2:
            half = len(inputs) // 2
            inputs[half:half] = [SetLookahead("dial", bias=-0.5, max_lookahead_ms=400), Flush("flush")]
        sessions.append(room.engine.open(options))
        queues.append(inputs)
    turn = 0
    while not all(session.done for session in sessions):
        for number, (session, queue) in enumerate(zip(sessions, queues, strict=True)):
            if queue and (turn + number) % 3:
                room.push(session, queue.pop(0))
        room.step(*sessions)
        turn += 1
    for session in sessions:
        session.close()
    return [room.of(session) for session in sessions]


@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_recordings_on_a_device_give_the_same(
    bundle: SmallBundle, clips: dict[str, Clip], chunk: str
) -> None:
    some = {name: clips[name] for name in ("digit-three", "wake-alexa", "prompt-password", "coffee-mocha")}
    for have, want in zip(
        together(on_device(bundle), some, chunk), together(Room(bundle.path), some, chunk), strict=True
    ):
        same(have, want)


def test_recordings_by_plans_give_the_same(
    bundle: SmallBundle, clips: dict[str, Clip], tmp_path: Path
) -> None:
    some = {name: clips[name] for name in ("digit-three", "wake-alexa", "coffee-mocha")}
    devices: list[HostDevice] = []
    with installed(devices) as builder:
        room = planned(bundle, tmp_path)
        assert builder.built == 2
        assert (room.engine.info.backend, room.engine.info.precision) == ("tensorrt", "fp32")
        found = together(room, some, "37 ms")
        assert planned(bundle, tmp_path).engine.free_slots == 6
        assert builder.built == 2  # from the cache
    for have, want in zip(found, together(Room(bundle.path), some, "37 ms"), strict=True):
        same(have, want)
    assert "replay" in devices[0].calls
    assert not {"upload", "download", "copy back"} & set(devices[0].calls)


def test_compiled_programs_give_the_same(
    bundle: SmallBundle, clips: dict[str, Clip], captured: list[str]
) -> None:
    some = {name: clips[name] for name in ("digit-three", "wake-alexa")}
    room = Room(bundle.path, "torch", 2, compiled=True)
    assert len(captured) == 2
    for have, want in zip(
        together(room, some, "37 ms"), together(Room(bundle.path), some, "37 ms"), strict=True
    ):
        same(have, want)


def test_bfloat16_is_near_and_half_as_large(bundle: SmallBundle, clips: dict[str, Clip]) -> None:
    room = Room(bundle.path, "torch", precision="bf16")
    assert (room.engine.info.backend, room.engine.info.precision) == ("torch", "bf16")
    near(room, bundle, clips["digit-seven"], 0.1)


def test_plans_in_half_precision_are_near(
    bundle: SmallBundle, clips: dict[str, Clip], tmp_path: Path
) -> None:
    with installed([]):
        near(planned(bundle, tmp_path, precision="float16"), bundle, clips["digit-seven"], 0.02)


def near(room: Room, bundle: SmallBundle, clip: Clip, bound: float) -> None:
    """Without lookahead, which rounding may change, rows are near float32's; and state is narrow."""
    options = SpeechOptions(sample_rate=clip.rate, max_lookahead_ms=0)
    have, want = (
        one.play(one.engine.open(options), whole(clip.samples, clip.rate, "37 ms"))
        for one in (room, Room(bundle.path))
    )
    assert room.engine.cache_bytes < 0.7 * on_device(bundle).engine.cache_bytes
    assert have.available == want.available
    far = np.linalg.norm(have.encoded - want.encoded) / np.linalg.norm(want.encoded)
    assert 0 < far < bound


def test_a_session_moves_between_a_device_and_the_processor(
    bundle: SmallBundle, clips: dict[str, Clip]
) -> None:
    """Checkpoints are the same, whatever the replicas run on."""
    clip = clips["coffee-mocha"]
    inputs = whole(clip.samples, clip.rate, "37 ms")
    third = len(inputs) // 3
    straight = Room(bundle.path)
    want = straight.play(straight.engine.open(SpeechOptions(sample_rate=clip.rate)), inputs)
    rooms = [on_device(bundle, 2), Room(bundle.path, slots=2), on_device(bundle, 2)]
    heard = Heard()
    session = rooms[0].engine.open(SpeechOptions(sample_rate=clip.rate))
    for number, room in enumerate(rooms):
        part = inputs[number * third : (number + 1) * third if number < 2 else None]
        found = room.play(session, part)
        heard.rows += found.rows
        heard.available += found.available
        heard.events += found.events
        if number < 2:
            checkpoint = session.export()
            session.close()
            session = rooms[number + 1].engine.restore(checkpoint)
    same(heard, want)


def test_a_slot_is_clean_when_it_is_taken_again(bundle: SmallBundle, clips: dict[str, Clip]) -> None:
    clip = clips["digit-three"]
    room = on_device(bundle, 1)
    found = []
    for name in ("wake-alexa", "digit-three", "digit-three"):
        session = room.engine.open(SpeechOptions(sample_rate=clips[name].rate))
        heard = room.play(session, whole(clips[name].samples, clips[name].rate, "random"))
        session.close()
        found.append(heard)
    other = Room(bundle.path)
    want = other.play(
        other.engine.open(SpeechOptions(sample_rate=clip.rate)), whole(clip.samples, clip.rate, "random")
    )
    for heard in found[1:]:
        same(heard, want)


def test_what_cannot_be_served_is_refused(bundle: SmallBundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"precision must be one of float32, bfloat16 .* not 'float16'"):
        load(bundle.path, slots=1, max_batch=1, backend="torch", precision="fp16", device="cpu")
    with pytest.raises(ProgramError, match="the backend tensorrt needs plans"):
        load(bundle.path, slots=1, max_batch=1, backend="tensorrt")
    plans = BundlePlans(load_bundle(bundle.path), "float32", PlanCache(tmp_path), GPU, 2, True)
    with (
        installed([]),
        pytest.raises(ProgramError, match=r"slots must be at most 4 for each of max_batch .*, 8, not 9"),
    ):
        load(bundle.path, slots=9, max_batch=2, backend="tensorrt", plan_of=plans)


def test_calls_have_few_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(6) == [1, 2, 3, 6]
    for most in (5, 64, 1000):
        sizes = sizes_up_to(most)
        assert sizes[-1] == most
        assert len(sizes) <= MOST_SIZES
        assert all(2 * low >= high for low, high in pairwise(sizes))


def test_more_rows_than_a_call_takes_are_joined_in_several() -> None:
    calls: list[int] = []

    class Program:
        def run(self, feeds: Any) -> dict[str, Any]:
            calls.append(len(feeds["encoded"]))
            return {"log_probs": feeds["encoded"] * 2 + feeds["contexts"][:, :1]}

    joiner = PaddedJoiner(Program(), HOST, 4)
    encoded = np.arange(22, dtype=np.float32).reshape(11, 2)
    contexts = np.arange(22).reshape(11, 2)
    np.testing.assert_array_equal(joiner(encoded, contexts), encoded * 2 + contexts[:, :1])
    assert calls == [4, 4, 4]
