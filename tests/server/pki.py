"""Certificates for tests, with the names and the dates that a test wants."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme

HOST = "localhost"
YESTERDAY = timedelta(days=-1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Replace the files `certificate.pem` and `key.pem` of `folder`."""
        files = folder / "certificate.pem", folder / "key.pem"
        for path, data in zip(files, (self.certificate, self.key), strict=True):
            draft = path.with_suffix(".tmp")
            draft.write_bytes(data)
            draft.replace(path)
        return files


class Authority:
    """Issues certificates, for this host unless another name is given."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    @property
    def roots(self) -> bytes:
        """Its own certificate."""
        return self._ca.cert_pem.bytes()

    def issue(self, *names: str, expires: timedelta = timedelta(days=1)) -> Issued:
        """A certificate that ends that long from now."""
        found = self._ca.issue_cert(
            *(names or (HOST,)),
            not_before=datetime.now(UTC) - timedelta(days=30),
            not_after=datetime.now(UTC) + expires,
        )
        chain = b"".join(pem.bytes() for pem in found.cert_chain_pems)
        return Issued(chain, found.private_key_pem.bytes())


def channel(port: int, roots: bytes, own: Issued | None = None) -> grpc.aio.Channel:
    """A connection of its own to a port of this machine with TLS."""
    pair: tuple[Any, Any] = (None, None) if own is None else (own.key, own.certificate)
    credentials = grpc.ssl_channel_credentials(roots, *pair)
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(f"{HOST}:{port}", credentials, options)
