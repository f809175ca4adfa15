"""The plan cache: what a key holds, what is refused, one build for many, nothing half-written."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from realtide.engines.runtime import plans
from realtide.engines.runtime.onnx_file import GraphInfo
from realtide.engines.runtime.plan_file import PlanError
from realtide.engines.runtime.plan_key import ANY, PORTABLE, Gpu, PlanKey, weights_digest
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import Array, ProgramError, TensorSpec

KEY = PlanKey(
    graph="a" * 64, weights="b" * 64, flavour="tensorrt", version="11.4.0", gpu="NVIDIA H100 80GB HBM3",
    capability="9.0", driver="580.95.05", precision="float16", profile="n=1:4:16",
)  # fmt: skip
SUBJECT = "video/denoise/float16"
PLAN = bytes(range(256)) * 4

CHILD = """
import logging, os, signal, sys, time
from pathlib import Path
from realtide.engines.runtime import plan_file
from realtide.engines.runtime.plans import PlanCache
from tests.engines.runtime.test_plans import KEY, SUBJECT, PLAN

folder, name, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def build():
    with (folder / "builds").open("a") as file:
        file.write(name + chr(10))
    print("building", flush=True)
    if how == "wait":
        sys.stdin.readline()
    return PLAN

real_open, real_rename, real_fsync = os.fdopen, os.rename, os.fsync
if how == "half":
    class Half:
        def __init__(self, stream): self.stream = stream
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def write(self, data):
            self.stream.write(data[: len(data) // 2] if data is PLAN else data)
            if data is PLAN:
                self.stream.flush()
                die()
    os.fdopen = lambda file, mode: Half(real_open(file, mode))
elif how == "unsynced":
    os.fsync = lambda file: die()
elif how == "unnamed":
    os.rename = lambda *given, **more: die()
plan = PlanCache(folder / "cache").get(SUBJECT, KEY, build)
print("right" if plan == PLAN else "wrong", flush=True)
"""


def child(folder: Path, name: str, how: str = "straight") -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'clients' / 'python'}"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), name, how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def line(stream: object) -> str:
    text = stream.readline()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text.strip()


def builds(folder: Path) -> list[str]:
    return (folder / "builds").read_text().split()


def never() -> bytes:
    raise AssertionError("built")


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache")


def test_every_field_makes_another_key() -> None:
    digests = {KEY.digest}
    for field in dataclasses.fields(PlanKey):
        other = dataclasses.replace(KEY, **{field.name: getattr(KEY, field.name) + "0"})
        digests.add(other.digest)
        (difference,) = KEY.differences(other)
        assert difference.startswith(field.name + " ")
    assert len(digests) == 1 + len(dataclasses.fields(PlanKey))
    # Fields are kept apart: what moves from one into the next is another key.
    moved = dataclasses.replace(KEY, flavour="tensorrt1", version="1.4.0")
    assert moved.digest not in digests
    assert PlanKey.from_dict(KEY.to_dict()) == KEY
    for wrong in ({}, KEY.to_dict() | {"driver": 5}, KEY.to_dict() | {"more": "x"}):
        with pytest.raises(ValueError, match="not those of this version"):
            PlanKey.from_dict(wrong)


def test_the_weights_that_a_graph_uses_are_in_its_digest() -> None:
    half = np.dtype(np.float16)
    external = (TensorSpec("w@int8", np.dtype(np.int8), (2, 3)), TensorSpec("b", half, (3,)))
    info = GraphInfo((), (), (), (), external, {})
    weights: dict[str, Array] = {"w": np.ones((2, 3), half), "b": np.zeros(3, half), "unused": np.ones(1)}
    digest = weights_digest(info, weights)
    assert digest == weights_digest(info, weights | {"unused": np.zeros(9)})
    assert digest == weights_digest(info, weights | {"w": np.ones((3, 2), half).T})
    others: tuple[dict[str, Array], ...] = (
        {"w": 2 * np.ones((2, 3), half)},
        {"b": np.zeros(3, np.float32)},
        {"w": np.ones((3, 2), half)},
    )
    for other in others:
        assert weights_digest(info, weights | other) != digest
    with pytest.raises(ProgramError, match="wants weight 'b'"):
        weights_digest(info, {"w": weights["w"]})


def test_a_target_is_written_as_people_write_it() -> None:
    assert Gpu.parse("any") == PORTABLE
    assert Gpu.parse("12.0") == Gpu(ANY, "12.0", ANY)
    assert Gpu.parse("NVIDIA L4:8.9:580.95") == Gpu("NVIDIA L4", "8.9", "580.95")
    for wrong in ("", "L4", "L4:89", ":8.9", "a:8.9:1:2"):
        with pytest.raises(ValueError, match="gpu: "):
            Gpu.parse(wrong)


def test_a_plan_is_built_once_and_read_after(cache: PlanCache) -> None:
    assert cache.get(SUBJECT, KEY, lambda: PLAN) == PLAN
    assert cache.get(SUBJECT, KEY, never) == PLAN
    assert cache.get(SUBJECT, KEY) == PLAN
    (entry,) = cache.entries()
    assert entry.header is not None
    assert (entry.header.subject, entry.header.key, entry.header.size) == (SUBJECT, KEY, len(PLAN))
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
    assert sorted(path.name for path in cache.directory.iterdir()) == [entry.path.name]  # no lock, no rest
    cache.remove(entry.path.name)
    assert cache.entries() == []


def test_what_does_not_fit_is_refused_with_each_difference(cache: PlanCache) -> None:
    with pytest.raises(PlanError, match="there is no plan of video/denoise/float16"):
        cache.get(SUBJECT, KEY)
    cache.get(SUBJECT, KEY, lambda: PLAN)
    wanted = dataclasses.replace(KEY, driver="590.1", version="11.5.0", graph="c" * 64)
    with pytest.raises(PlanError) as caught:
        cache.get(SUBJECT, wanted)
    assert (
        "does not fit: graph aaaaaaaaaaaa -> cccccccccccc; version 11.4.0 -> 11.5.0; "
        "driver 580.95.05 -> 590.1: `realtide models build`"
    ) in str(caught.value)
    with pytest.raises(PlanError, match="there is no plan of video/clean"):
        cache.get("video/clean/float16", wanted)
    assert cache.get(SUBJECT, wanted, lambda: b"another") == b"another"
    assert cache.get(SUBJECT, KEY) == PLAN


def test_a_rebuild_says_why(cache: PlanCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.get(SUBJECT, KEY, lambda: PLAN)
    with caplog.at_level(logging.INFO):
        cache.get(SUBJECT, dataclasses.replace(KEY, driver="590.1"), lambda: PLAN)
    assert "the one at hand does not fit: driver 580.95.05 -> 590.1" in caplog.text


def test_a_plan_under_a_name_that_is_not_its_own_is_refused(cache: PlanCache) -> None:
    cache.get(SUBJECT, KEY, lambda: PLAN)
    wanted = dataclasses.replace(KEY, gpu="NVIDIA L4", capability="8.9")
    (entry,) = cache.entries()
    name = entry.path.name.replace(KEY.digest[:32], wanted.digest[:32])
    entry.path.rename(entry.path.with_name(name))
    with pytest.raises(
        PlanError, match=r"does not fit: gpu 'NVIDIA H100 80GB HBM3' -> 'NVIDIA L4'; capability 9.0 -> 8.9$"
    ):
        cache.get(SUBJECT, wanted, never)


def test_what_is_cut_off_or_altered_is_refused(cache: PlanCache) -> None:
    cache.get(SUBJECT, KEY, lambda: b"plan" * 8)
    (entry,) = cache.entries()
    whole = entry.path.read_bytes()
    for length in range(len(whole)):
        entry.path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match=entry.path.name):
            cache.get(SUBJECT, KEY, never)
    for at in range(len(whole)):
        entry.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(PlanError, match=entry.path.name):
            cache.get(SUBJECT, KEY, never)
    entry.path.write_bytes(whole + b"x")
    with pytest.raises(PlanError, match="cut off or too long"):
        cache.get(SUBJECT, KEY, never)
    entry.path.write_bytes(b"text")
    (listed,) = cache.entries()
    assert (listed.header, "no plan file" in listed.problem) == (None, True)
    cache.remove(entry.path.name)
    assert cache.get(SUBJECT, KEY, lambda: PLAN) == PLAN


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_directory_that_others_may_write_is_refused(cache: PlanCache, mode: int) -> None:
    cache.get(SUBJECT, KEY, lambda: PLAN)
    cache.directory.chmod(mode)
    for use in (lambda: cache.get(SUBJECT, KEY, never), cache.entries, lambda: cache.remove("x.plan")):
        with pytest.raises(PlanError, match=f"cache: this directory has mode {mode:04o}, .*chmod go-w"):
            use()
    cache.directory.chmod(0o755)
    assert cache.get(SUBJECT, KEY, never) == PLAN


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_plan_that_others_may_write_is_refused(cache: PlanCache, mode: int) -> None:
    cache.get(SUBJECT, KEY, lambda: PLAN)
    (entry,) = cache.entries()
    entry.path.chmod(mode)
    with pytest.raises(PlanError, match=f"this plan has mode {mode:04o}"):
        cache.get(SUBJECT, KEY, never)
    entry.path.chmod(0o644)
    assert cache.get(SUBJECT, KEY, never) == PLAN


def test_somebody_elses_files_and_links_are_refused(
    cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get(SUBJECT, KEY, lambda: PLAN)
    (entry,) = cache.entries()
    moved = entry.path.rename(cache.directory.parent / "moved")
    entry.path.symlink_to(moved)
    with pytest.raises(PlanError, match=entry.path.name):
        cache.get(SUBJECT, KEY, never)
    entry.path.unlink()
    os.mkfifo(entry.path, 0o600)
    with pytest.raises(PlanError, match="must be a regular file"):
        cache.get(SUBJECT, KEY, never)
    real = os.fstat

    def another(file: int) -> os.stat_result:
        values = list(real(file))
        values[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", another)
    with pytest.raises(
        PlanError, match=r"this directory belongs to user \d+; .* only taken from user \d+ or root"
    ):
        cache.get(SUBJECT, KEY, never)


def test_only_plans_of_the_directory_are_removed(cache: PlanCache) -> None:
    for wrong in ("../x.plan", "notes.txt", ".x.plan", ""):
        with pytest.raises(PlanError, match="must be the name of a plan file"):
            cache.remove(wrong)
    with pytest.raises(PlanError, match=r"there is no plan x\.plan"):
        cache.remove("x.plan")
    assert cache.entries() == []


def test_the_default_directory_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert PlanCache().directory == Path("/somewhere/realtide/plans")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert PlanCache().directory == Path("/home/someone/.cache/realtide/plans")


def test_two_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    first = child(tmp_path, "first", "wait")
    assert line(first.stdout) == "building"
    second = child(tmp_path, "second")
    assert line(second.stderr) == f"somebody builds the plan of {SUBJECT}: waiting"
    told, _ = first.communicate("go\n")
    assert told.strip() == "right"
    told, _ = second.communicate()
    assert told.strip() == "right"
    assert (first.returncode, second.returncode) == (0, 0)
    assert builds(tmp_path) == ["first"]


def test_a_killed_builder_lets_the_next_build(tmp_path: Path) -> None:
    first = child(tmp_path, "first", "wait")
    assert line(first.stdout) == "building"
    second = child(tmp_path, "second")
    assert line(second.stderr) == f"somebody builds the plan of {SUBJECT}: waiting"
    first.kill()
    first.communicate()
    told, _ = second.communicate()
    assert told.split() == ["building", "right"]
    assert builds(tmp_path) == ["first", "second"]
    assert PlanCache(tmp_path / "cache").get(SUBJECT, KEY) == PLAN


def test_threads_that_ask_at_once_build_once(cache: PlanCache) -> None:
    waiting, count, lock = threading.Event(), 0, threading.Lock()
    results: list[bytes] = []

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting" in record.getMessage():
                waiting.set()

    def build() -> bytes:
        nonlocal count
        with lock:
            count += 1
        assert waiting.wait(60)  # at least one of the others stands at the lock
        return PLAN

    handler = Waits()
    plans.log.addHandler(handler)
    level = plans.log.level
    plans.log.setLevel(logging.INFO)
    try:
        threads = [
            threading.Thread(target=lambda: results.append(cache.get(SUBJECT, KEY, build))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        plans.log.removeHandler(handler)
        plans.log.setLevel(level)
    assert (count, results) == (1, [PLAN] * 4)


def test_a_builder_that_fails_leaves_nothing_and_lets_the_next_build(cache: PlanCache) -> None:
    def fails() -> bytes:
        raise ProgramError("no kernel")

    with pytest.raises(ProgramError, match="no kernel"):
        cache.get(SUBJECT, KEY, fails)
    assert list(cache.directory.iterdir()) == []
    assert cache.get(SUBJECT, KEY, lambda: PLAN) == PLAN


@pytest.mark.parametrize("when", ["half", "unsynced", "unnamed"])
def test_a_writer_killed_at_any_point_leaves_no_plan(tmp_path: Path, when: str) -> None:
    process = child(tmp_path, "first", when)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cache = PlanCache(tmp_path / "cache")
    left = [path.name for path in cache.directory.iterdir()]
    assert [name for name in left if name.endswith(".tmp")]  # it had begun to write
    assert cache.entries() == []
    with pytest.raises(PlanError, match="there is no plan"):
        cache.get(SUBJECT, KEY)
    assert cache.get(SUBJECT, KEY, lambda: PLAN) == PLAN
    (entry,) = cache.entries()
    assert [path.name for path in cache.directory.iterdir()] == [entry.path.name]


def test_a_plan_is_on_the_disk_before_it_has_its_name(
    cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(file: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def recorded_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append("rename")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    cache.get(SUBJECT, KEY, lambda: PLAN)
    assert done == ["file", "rename", "directory"]


def test_a_full_disk_is_told_and_leaves_nothing(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match=r"video.denoise.float16\.\w+\.plan: No space left on device"):
        cache.get(SUBJECT, KEY, lambda: PLAN)
    assert list(cache.directory.iterdir()) == []
