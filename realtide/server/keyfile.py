"""API keys and the file that holds their hashes.

A key is ``rt_`` + id + ``_`` + secret. The id, 8 letters or digits, is public: it stands in logs and finds
the entry. The secret is 256 random bits. Because nobody can guess it, a fast hash of it is as good as a slow
one, which would let strangers spend the server's time instead; with a *pepper*, a secret that is not in the
file, the hash is keyed, and the file alone cannot even tell whether a key is right (docs/security.md).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from realtide.server.config import ConfigError

Service = Literal["speech", "video", "image", "models"]
SERVICES: tuple[Service, ...] = ("speech", "video", "image", "models")

_ID = "[a-z2-7]{8}"
_KEY = re.compile(f"rt_({_ID})_([A-Za-z0-9_-]{{43}})")
_SECRET_BYTES = 32
_PLAIN, _KEYED = "sha256", "hmac-sha256"


class Key(NamedTuple):
    """A key as its owner has it."""

    id: str
    secret: str

    @property
    def text(self) -> str:
        """What a client sends."""
        return f"rt_{self.id}_{self.secret}"

    @classmethod
    def new(cls) -> Key:
        """A random one."""
        name = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        return cls(name, secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Key | None:
        """The key in `text`; None if it has not the form of one."""
        found = _KEY.fullmatch(text)
        return None if found is None else cls(found[1], found[2])

    def hash(self, pepper: str | None) -> str:
        """What the file holds: scheme, colon, digest in hexadecimal."""
        message = f"realtide api key\0{self.id}\0{self.secret}".encode()
        if pepper is None:
            return f"{_PLAIN}:{hashlib.sha256(message).hexdigest()}"
        return f"{_KEYED}:{hmac.new(pepper.encode(), message, hashlib.sha256).hexdigest()}"


class Entry(BaseModel):
    """What the file says of one key. What is None takes the server's value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=f"^{_ID}$")]
    hash: Annotated[str, Field(pattern=f"^({_PLAIN}|{_KEYED}):[0-9a-f]{{64}}$", repr=False)]
    note: Annotated[str, Field(max_length=200)] = ""
    services: tuple[Service, ...] = SERVICES
    sessions: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    opens_per_minute: Annotated[float, Field(ge=0.0, le=1e6)] | None = None
    expires: AwareDatetime | None = None

    @field_validator("services")
    @classmethod
    def _some(cls, value: tuple[Service, ...]) -> tuple[Service, ...]:
        if not value:
            raise ValueError("must name at least one service")
        return value

    @property
    def keyed(self) -> bool:
        """Whether its hash was made with a pepper."""
        return self.hash.startswith(f"{_KEYED}:")

    def expired(self, now: datetime) -> bool:
        """Whether it holds no longer at `now`."""
        return self.expires is not None and self.expires <= now


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Entry, ...] = ()


class Keys:
    """Every key that a server knows, by hash.

    Args:
        entries: as in the file.
        pepper: what keyed hashes were made with.
    """

    def __init__(self, entries: Iterable[Entry], pepper: str | None) -> None:
        self.entries: Mapping[str, Entry] = {entry.id: entry for entry in entries}
        self._pepper = pepper

    def find(self, text: str) -> Entry | None:
        """The entry that `text` is the key of. A wrong secret takes as long as an id that there is not."""
        key = Key.parse(text)
        if key is None:
            return None
        entry = self.entries.get(key.id)
        keyed = self._pepper is not None if entry is None else entry.keyed
        given = key.hash(self._pepper if keyed else None)
        right = hmac.compare_digest(given, given[::-1] if entry is None else entry.hash)
        return entry if right else None

    def holds(self, entry: Entry, now: datetime) -> bool:
        """Whether a key that was found earlier would be found still."""
        known = self.entries.get(entry.id)
        return known is not None and known.hash == entry.hash and not known.expired(now)


def read(path: Path, pepper: str | None) -> Keys:
    """Read and check a file of keys.

    Raises:
        ConfigError: it cannot be read, an entry is not valid, an id stands there twice, or a hash needs a
            pepper that is not given.
    """
    entries = entries_of(path)
    for entry in entries:
        if entry.keyed and pepper is None:
            raise ConfigError(
                f"api_key_file: key {entry.id} was made with a pepper, api_key_pepper is not set"
            )
    return Keys(entries, pepper)


def entries_of(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; none of an empty one.

    Raises:
        ConfigError: see `read`.
    """
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {path} cannot be read: {error}") from None
    except yaml.YAMLError:  # whose message quotes the file
        raise ConfigError(f"api_key_file: {path} is not valid YAML") from None
    try:
        entries = _File.model_validate({} if data is None else data).keys
    except ValidationError as error:
        lines = (f"api_key_file: {path}: {problem}" for problem in _problems(error))
        raise ConfigError("\n".join(lines)) from None
    ids = [entry.id for entry in entries]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise ConfigError(f"api_key_file: {path}: more than one key has the id {', '.join(twice)}")
    return entries


def parse_entry(fields: Mapping[str, Any]) -> Entry:
    """An entry of its fields.

    Raises:
        ConfigError: one is not valid.
    """
    try:
        return Entry.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error))) from None


def _problems(error: ValidationError) -> list[str]:
    """Field and problem, without the values, some of which must not be shown."""
    return [
        f"{'.'.join(str(part) for part in one['loc']) or 'the file'}: "
        + ("no such field" if one["type"] == "extra_forbidden" else one["msg"])
        for one in error.errors()
    ]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the file at once. A new one is readable by its owner only, another keeps owner and mode.

    Raises:
        OSError: it cannot be written.
    """
    data = {"keys": [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if path.exists():
                before = path.stat()
                os.chown(handle, before.st_uid, before.st_gid)
                os.chmod(handle, stat.S_IMODE(before.st_mode))
            yaml.safe_dump(data, file, sort_keys=False)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
