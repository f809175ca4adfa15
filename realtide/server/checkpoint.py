"""The envelope around an engine's exported state: versioned, integrity-protected, bounded, says what it fits.

    "RTCP" | version u8 | seal u8 | header length u32 | header (JSON) | state | 32 bytes of seal

All numbers little endian. The seal covers everything before it: HMAC-SHA256 under the deployment's key, or
plain SHA-256 (against damage, not against malice) where no key is configured.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import struct
from dataclasses import asdict, dataclass

_MAGIC = b"RTCP"
_VERSION = 1
_PREFIX = struct.Struct("<4sBBI")
_SEAL_BYTES = 32
_PLAIN, _KEYED = 0, 1


class BadCheckpoint(Exception):
    """Damaged, of an unknown version, or not made by this deployment; the message says which."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the server must know to resume, before an engine looks at the state."""

    service: str  # "realtide.v1.Speech"
    engine: str
    model: str
    model_version: str
    session_id: str
    position: int  # first media unit that the state does not cover
    setup: bytes  # the service's own: a serialized message with what was negotiated


def seal(header: Header, state: bytes, key: str | None) -> bytes:
    """Wrap `state`."""
    fields = asdict(header) | {"setup": base64.b64encode(header.setup).decode()}
    text = json.dumps(fields, separators=(",", ":")).encode()
    body = _PREFIX.pack(_MAGIC, _VERSION, _PLAIN if key is None else _KEYED, len(text)) + text + state
    return body + _digest(body, key)


def unseal(data: bytes, key: str | None) -> tuple[Header, bytes]:
    """Check and unwrap.

    Raises:
        BadCheckpoint: see there.
    """
    if len(data) < _PREFIX.size + _SEAL_BYTES:
        raise BadCheckpoint("damaged: too short to be a checkpoint")
    magic, version, kind, length = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise BadCheckpoint("damaged: not a checkpoint")
    if version != _VERSION:
        raise BadCheckpoint(f"of version {version}, this server knows version {_VERSION}")
    if kind != (_PLAIN if key is None else _KEYED):
        raise BadCheckpoint("not made by this deployment: sealed in another way")
    body, seal_bytes = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if not hmac.compare_digest(_digest(body, key), seal_bytes):
        raise BadCheckpoint("damaged, or not made by this deployment: the seal does not match")
    try:
        text = body[_PREFIX.size : _PREFIX.size + length]
        fields = json.loads(text)
        fields["setup"] = base64.b64decode(fields["setup"], validate=True)
        header = Header(**fields)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise BadCheckpoint(f"damaged header: {error}") from None
    return header, body[_PREFIX.size + length :]


def _digest(body: bytes, key: str | None) -> bytes:
    if key is None:
        return hashlib.sha256(body).digest()
    return hmac.digest(key.encode(), body, "sha256")
