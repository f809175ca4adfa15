"""The plan cache: one build for each key, however many ask (ours; POSIX systems).

A plan lies under a name that its key makes, so what does not fit is not even opened. The key in the file is
compared all the same, before TensorRT sees a byte of the plan. Builders of one key, threads and processes
alike, wait for each other at a file lock, which the kernel frees when its holder dies; who waited finds the
plan.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from realtide.engines.runtime.plan_file import (
    SUFFIX,
    PlanError,
    PlanHeader,
    open_directory,
    read_file,
    read_header,
    read_plan,
    sweep,
    write_file,
    write_plan,
)
from realtide.engines.runtime.plan_key import PlanKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: the file.
        header: what it says of itself; None if it cannot be read.
        problem: why its header cannot be read; empty if it can.
        size: bytes of the file.
    """

    path: Path
    header: PlanHeader | None
    problem: str
    size: int


def default_directory() -> Path:
    """``realtide/plans`` in the user's cache directory (XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "realtide" / "plans"


class PlanCache:
    """A directory of plans. Any number of threads and processes may use it at once.

    Args:
        directory: made when the first plan is written. It must belong to us or to root, and nobody else may
            write it.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()

    def get(self, subject: str, key: PlanKey, build: Callable[[], bytes] | None = None) -> bytes:
        """The plan of a key, built if there is none.

        Args:
            subject: what it is of, for people and for what is said of plans that do not fit:
                ``longlive-emoji/denoise/float16``.
            key: what it must depend on.
            build: makes the plan. None: what is not there is refused.

        Returns:
            The serialized plan, whose key and checksum were verified.

        Raises:
            PlanError: there is no plan and it may not be built: the message names each difference to the
                nearest plan of this subject. Or directory or file are not ours alone, or the file is damaged.
        """
        found = self._read(key)
        if found is not None:
            return found
        near = self._nearest(subject, key)
        if build is None:
            if near is None:
                raise PlanError(
                    f"there is no plan of {subject} in {self.directory}: `realtide models build` makes it"
                )
            raise PlanError(
                f"the plan of {subject} in {self.directory} does not fit: {'; '.join(near)}: "
                "`realtide models build` makes one that does"
            )
        with _closing(open_directory(self.directory, create=True)) as directory:
            name = _name(subject, key)
            with _locked(directory, f".{key.digest}.lock", subject):
                found = self._read(key)  # somebody built it while we waited
                if found is not None:
                    return found
                sweep(directory, _ending(key))
                why = f"; the one at hand does not fit: {'; '.join(near)}" if near else ""
                log.info("building the plan of %s%s", subject, why)
                start = time.monotonic()
                plan = build()
                seconds = round(time.monotonic() - start, 3)
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                try:
                    write_plan(directory, name, PlanHeader(subject, key, len(plan), seconds, now), plan)
                except OSError as error:
                    raise PlanError(f"{self.directory / name}: {error.strerror}") from error
                log.info("%s: plan of %d bytes in %.1f s", self.directory / name, len(plan), seconds)
        return plan

    def entries(self) -> list[Entry]:
        """All plan files, by name; the headers are read, the plans are not. Raises PlanError."""
        try:
            opened = open_directory(self.directory, create=False)
        except FileNotFoundError:
            return []
        found = []
        with _closing(opened) as directory:
            for name in sorted(os.listdir(directory)):
                if not name.endswith(SUFFIX) or name.startswith("."):
                    continue
                path = self.directory / name
                try:
                    size = os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
                    found.append(Entry(path, read_header(directory, name, path), "", size))
                except FileNotFoundError:
                    continue  # removed since it was listed
                except PlanError as error:
                    found.append(Entry(path, None, str(error), size))
        return found

    def remove(self, name: str) -> None:
        """Remove a plan file by its name in the directory; damaged ones too. Raises PlanError."""
        if Path(name).name != name or not name.endswith(SUFFIX) or name.startswith("."):
            raise PlanError(f"{name!r} must be the name of a plan file, *{SUFFIX}")
        try:
            with _closing(open_directory(self.directory, create=False)) as directory:
                os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            raise PlanError(f"there is no plan {name} in {self.directory}") from None
        except OSError as error:
            raise PlanError(f"{self.directory / name}: {error.strerror}") from error

    def read_timing(self, name: str) -> bytes:
        """The timing cache of this name; empty if there is none. Raises PlanError."""
        try:
            with _closing(open_directory(self.directory, create=False)) as directory:
                return read_file(directory, name, self.directory / name)
        except FileNotFoundError:
            return b""

    def write_timing(self, name: str, data: bytes) -> None:
        """Replace a timing cache. Of two who do at once one wins: what the other measured is measured again.

        Raises:
            PlanError: it cannot be written.
        """
        try:
            with _closing(open_directory(self.directory, create=True)) as directory:
                write_file(directory, name, (data,))
        except OSError as error:
            raise PlanError(f"{self.directory / name}: {error.strerror}") from error

    def _read(self, key: PlanKey) -> bytes | None:
        """The plan under a key's name; None if there is none. Raises PlanError."""
        ending = _ending(key)
        try:
            with _closing(open_directory(self.directory, create=False)) as directory:
                for name in sorted(os.listdir(directory)):
                    if name.endswith(ending) and not name.startswith("."):
                        return read_plan(directory, name, self.directory / name, key)[1]
        except FileNotFoundError:
            pass  # no directory, or removed while we looked
        return None

    def _nearest(self, subject: str, key: PlanKey) -> list[str] | None:
        """How the plan of this subject that differs least differs; None if there is none."""
        headers = [entry.header for entry in self.entries() if entry.header]
        found = [header.key.differences(key) for header in headers if header.subject == subject]
        return min(found, key=len, default=None)


def _name(subject: str, key: PlanKey) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", ".", subject).strip(".")[:100] + _ending(key)


def _ending(key: PlanKey) -> str:
    return f".{key.digest[:32]}{SUFFIX}"


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: int, name: str, subject: str) -> Iterator[None]:
    """Hold a lock file, against threads too: each opens the file anew, and flock tells openings apart.

    The holder removes the file when it leaves, so who gets the lock must see that the file is still there.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("somebody builds the plan of %s: waiting", subject)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(directory, name, lock):
                continue
            try:
                yield
            finally:
                os.unlink(name, dir_fd=directory)
            return
        finally:
            os.close(lock)


def _is_at(directory: int, name: str, file: int) -> bool:
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))
