r"""Plan files: a header that people can read, the plan, a checksum; written whole or not at all (ours).

    REALTIDE-PLAN 1\n
    {"subject": ..., "key": {...}, "bytes": ..., "seconds": ..., "created": ...}\n
    the plan
    SHA-256 of all that stands before it (32 bytes)

A plan is code that TensorRT will run, and it trusts what it reads. So files and their directory must belong
to us or to root and be writable by nobody else, and are checked through the descriptor that is then read:
what lies at a path may change between looking and reading. A checksum finds a torn or damaged file; it is no
signature, which is what owner and mode are for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from realtide.engines.runtime.plan_key import PlanKey
from realtide.engines.runtime.program import ProgramError

MAGIC = b"REALTIDE-PLAN 1\n"
SUFFIX = ".plan"
_MAX_HEADER = 65536
_CHECKSUM = 32


class PlanError(ProgramError):
    """A plan or its directory cannot be used; the message is one sentence that names the file."""


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What a plan file says of itself.

    Attributes:
        subject: what the plan is of, for people: ``longlive-emoji/denoise/float16``.
        key: what it depends on.
        size: bytes of the plan itself.
        seconds: what building it took.
        created: when it was built, UTC, ISO 8601.
    """

    subject: str
    key: PlanKey
    size: int
    seconds: float
    created: str

    def line(self) -> bytes:
        """The header as it stands in the file."""
        values = {
            "subject": self.subject,
            "key": self.key.to_dict(),
            "bytes": self.size,
            "seconds": self.seconds,
            "created": self.created,
        }
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def write_plan(directory: int, name: str, header: PlanHeader, plan: bytes) -> None:
    """Write a plan so that no reader ever sees a part of it, and so that it outlives a power cut.

    Args:
        directory: descriptor of the directory.
        name: file name in it.
        header: its `size` is the plan's.
        plan: what TensorRT serialized.

    Raises:
        OSError: it cannot be written; nothing is left under `name`.
    """
    head = MAGIC + header.line()
    total = hashlib.sha256(head)
    total.update(plan)
    write_file(directory, name, (head, plan, total.digest()))


def write_file(directory: int, name: str, parts: Sequence[bytes]) -> None:
    """Write any file in the same way. Raises OSError."""
    temporary = f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(file, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


def sweep(directory: int, ending: str) -> None:
    """Remove what killed writers of a key's plan left. The caller holds the key's lock: none is at work."""
    for entry in os.listdir(directory):
        if entry.startswith(".") and f"{ending}." in entry and entry.endswith(".tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry, dir_fd=directory)


def read_header(directory: int, name: str, label: Path) -> PlanHeader:
    """The header of a plan file, which is not read further. Raises PlanError, FileNotFoundError."""
    with _opened(directory, name, label) as file:
        return _header(file, label)[0]


def read_plan(directory: int, name: str, label: Path, wanted: PlanKey | None) -> tuple[PlanHeader, bytes]:
    """A plan whose key is as wanted and whose checksum holds.

    Args:
        directory: descriptor of the directory.
        name: file name in it.
        label: the path, for messages.
        wanted: its key must be this; None: any.

    Raises:
        PlanError: the file is not ours alone, is no plan, is cut off or altered, or its key differs.
        FileNotFoundError: there is none.
    """
    with _opened(directory, name, label) as file:
        header, head = _header(file, label)
        differing = header.key.differences(wanted) if wanted else []
        if differing:
            raise PlanError(f"{label}: the plan does not fit: {'; '.join(differing)}")
        with os.fdopen(os.dup(file), "rb") as stream:
            stream.seek(len(head))
            plan, checksum = stream.read(header.size), stream.read()
    if len(plan) != header.size or len(checksum) != _CHECKSUM:
        raise PlanError(f"{label}: the plan is cut off or too long; remove it and build it again")
    total = hashlib.sha256(head)
    total.update(plan)
    if total.digest() != checksum:
        raise PlanError(f"{label}: the plan was altered (its checksum differs); remove it and build it again")
    return header, plan


def read_file(directory: int, name: str, label: Path) -> bytes:
    """Any file that only we or root can write. Raises PlanError, FileNotFoundError."""
    with _opened(directory, name, label) as file, os.fdopen(os.dup(file), "rb") as stream:
        return stream.read()


def open_directory(path: Path, *, create: bool) -> int:
    """A descriptor of a directory that nobody but us and root can write.

    Raises:
        PlanError: it is somebody else's, or others may write it, or it cannot be opened or made.
        FileNotFoundError: there is none, and `create` is False.
    """
    try:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    try:
        _check_owner(os.fstat(directory), path, "directory")
    except PlanError:
        os.close(directory)
        raise
    return directory


@contextlib.contextmanager
def _opened(directory: int, name: str, label: Path) -> Iterator[int]:
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PlanError(f"{label}: {error.strerror}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(f"{label}: must be a regular file")
        _check_owner(status, label, "plan")
        yield file
    finally:
        os.close(file)


def _check_owner(status: os.stat_result, path: Path, what: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise PlanError(
            f"{path}: this {what} belongs to user {status.st_uid}; plans are code, and are only taken from "
            f"user {os.geteuid()} or root"
        )
    if status.st_mode & 0o022:
        raise PlanError(
            f"{path}: this {what} has mode {stat.S_IMODE(status.st_mode):04o}, so others may write it; plans "
            "are code: chmod go-w it"
        )


def _header(file: int, label: Path) -> tuple[PlanHeader, bytes]:
    start = os.pread(file, len(MAGIC) + _MAX_HEADER, 0)
    end = start.find(b"\n", len(MAGIC)) + 1
    if not start.startswith(MAGIC) or not end:
        raise PlanError(f"{label}: this is no plan file of this version")
    try:
        values = json.loads(start[len(MAGIC) : end])
        header = PlanHeader(
            subject=str(values["subject"]),
            key=PlanKey.from_dict(values["key"]),
            size=int(values["bytes"]),
            seconds=float(values["seconds"]),
            created=str(values["created"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{label}: its header cannot be read: {error}") from None
    if header.size < 0:
        raise PlanError(f"{label}: its header cannot be read: bytes is negative")
    return header, start[:end]
