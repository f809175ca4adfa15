"""TLS from files that may be renewed under a running server (cert-manager, a mounted Secret, a cron job)."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from realtide.server.config import ConfigError, ServerConfig

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass
class Certificates:
    """The server's certificate, its key, and the roots of its clients' certificates.

    gRPC asks for them in each handshake, in threads of its own. Files that have changed are read again; if
    what they hold cannot be used, perhaps because only half of it has been written yet, the last that could
    stays in force. Connections that exist keep what they were made with.

    Args:
        certificate: PEM chain, the server's own certificate first.
        key: PEM private key of it, without a passphrase.
        client_ca: PEM roots; None: clients need no certificate.
        on_failure: called, from any thread, when files that have changed cannot be used.
    """

    certificate: Path
    key: Path
    client_ca: Path | None
    on_failure: Callable[[], None] = lambda: None
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _seen: _Stamp = field(default=(), init=False, repr=False)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files.

        Raises:
            ConfigError: the files do not hold what they should.
        """
        self._seen = self._stamp()
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._changed,  # type: ignore[arg-type]  # None is what says "no change"; the stubs do not know
            require_client_authentication=self.client_ca is not None,
        )

    def _files(self) -> list[tuple[str, Path]]:
        roots = [] if self.client_ca is None else [("tls_client_ca", self.client_ca)]
        return [("tls_certificate", self.certificate), ("tls_key", self.key), *roots]

    def _stamp(self) -> _Stamp:
        """What changes when a file does; a missing file counts as unchanged until it is back."""
        found = []
        for _, path in self._files():
            try:
                stat = path.stat()
            except OSError:
                return self._seen
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC: what is new since the last handshake, or None."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            self._seen = stamp  # of before the reading: what changes meanwhile is read at the next handshake
            try:
                configuration = self._read()
            except ConfigError as error:
                log.error("TLS files have changed and cannot be used, the old ones stay in force: %s", error)
                self.on_failure()
                return None
            log.info("TLS files have changed and are in force")
            return configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Check the files, because gRPC would only say that its handshakes fail."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # With a password given nobody is asked for one on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"tls_certificate and tls_key: {_reason(error)}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                raise ConfigError(f"tls_client_ca: {_reason(error)}") from None
        try:
            pair = (self.key.read_bytes(), self.certificate.read_bytes())
            roots = None if self.client_ca is None else self.client_ca.read_bytes()
        except OSError as error:
            raise ConfigError(f"tls files: {error}") from None
        return grpc.ssl_server_certificate_configuration([pair], roots)


def _reason(error: Exception) -> str:
    """OpenSSL's words, which name no file."""
    reason = getattr(error, "reason", None)
    if reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    return f"cannot be used: {reason or error}"


def certificates(config: ServerConfig, on_failure: Callable[[], None]) -> Certificates | None:
    """Those of the configuration; None without TLS."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificates(config.tls_certificate, config.tls_key, config.tls_client_ca, on_failure)
