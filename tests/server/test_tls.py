"""TLS: certificates that are renewed under a running server, and files that cannot be used."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from realtide.server.app import Server
from realtide.server.config import ConfigError, ServerConfig
from realtide.server.tls import Certificates
from realtide_client.v1 import models_pb2, models_pb2_grpc
from tests.server import pki
from tests.server.engine import BurstEngine
from tests.server.helpers import DEFAULTS, Running, running


async def asks(channel: grpc.aio.Channel) -> list[str]:
    """Names of the models; raises if there is no answer."""
    stub: Any = models_pb2_grpc.ModelsStub(channel)
    return [one.name for one in (await stub.ListModels(models_pb2.ListModelsRequest(), timeout=10)).models]


def shown(port: int, roots: bytes) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=roots.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=pki.HOST) as secure,
    ):
        found = secure.getpeercert(binary_form=True)
    assert found is not None
    return found


def der(issued: pki.Issued) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.certificate.decode())


def settings(folder: Path, issued: pki.Issued, **more: Any) -> dict[str, Any]:
    certificate, key = issued.write(folder)
    return {"tls_certificate": certificate, "tls_key": key, **more}


async def test_both_sides_show_certificates(tmp_path: Path) -> None:
    authority, other = pki.Authority(), pki.Authority()
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots)
    async with running(**settings(tmp_path, authority.issue(), tls_client_ca=roots)) as server:
        port = server.server.port
        async with pki.channel(port, authority.roots, authority.issue("someone")) as channel:
            assert await asks(channel) == ["bursts"]
        for own in (None, other.issue("someone"), authority.issue("someone", expires=pki.YESTERDAY)):
            async with pki.channel(port, authority.roots, own) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asks(channel)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_renewed_certificates_need_no_restart(tmp_path: Path) -> None:
    authority = pki.Authority()
    first, second, third = (authority.issue() for _ in range(3))
    async with running(**settings(tmp_path, first)) as server:
        port = server.server.port
        async with pki.channel(port, authority.roots) as before:
            assert await asks(before) == ["bursts"]
            assert await asyncio.to_thread(shown, port, authority.roots) == der(first)
            second.write(tmp_path)
            assert await asyncio.to_thread(shown, port, authority.roots) == der(second)
            # Half of a renewal: what was in force stays so, and it is counted once.
            (tmp_path / "key.pem").write_bytes(third.key)
            for _ in range(2):
                assert await asyncio.to_thread(shown, port, authority.roots) == der(second)
            assert failures(server) == 1
            (tmp_path / "key.pem").unlink()
            assert await asyncio.to_thread(shown, port, authority.roots) == der(second)
            third.write(tmp_path)
            assert await asyncio.to_thread(shown, port, authority.roots) == der(third)
            assert failures(server) == 1
            assert await asks(before) == ["bursts"]  # a connection that exists goes on


async def test_roots_of_clients_are_renewed_too(tmp_path: Path) -> None:
    old, new, roots = pki.Authority(), pki.Authority(), tmp_path / "roots.pem"
    roots.write_bytes(old.roots)
    async with running(**settings(tmp_path, old.issue(), tls_client_ca=roots)) as server:
        port = server.server.port

        async def admitted(authority: pki.Authority) -> bool:
            async with pki.channel(port, old.roots, authority.issue("someone")) as channel:
                try:
                    return bool(await asks(channel))
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise
                    return False

        assert (await admitted(old), await admitted(new)) == (True, False)
        roots.write_bytes(old.roots + new.roots)
        assert (await admitted(old), await admitted(new)) == (True, True)
        roots.write_bytes(new.roots)
        assert (await admitted(old), await admitted(new)) == (False, True)


def failures(server: Running) -> float:
    found = server.server.metrics.registry.get_sample_value("realtide_reload_failures_total", {"file": "tls"})
    assert found is not None
    return found


async def test_files_that_cannot_be_used_are_a_sentence(tmp_path: Path) -> None:
    authority = pki.Authority()
    certificate, key = authority.issue().write(tmp_path)
    other = tmp_path / "other.pem"
    for data, problem in (
        (authority.issue().key, "tls_certificate and tls_key: the key does not belong to the certificate"),
        (b"nothing", "tls_certificate and tls_key: cannot be used"),
    ):
        other.write_bytes(data)
        config = ServerConfig(**(DEFAULTS | {"tls_certificate": certificate, "tls_key": other}))
        with pytest.raises(ConfigError, match=problem):
            async with Server(config, [BurstEngine()]):
                pass
    with pytest.raises(ConfigError, match="tls_client_ca: cannot be used"):
        Certificates(certificate, key, other).credentials()


def test_a_key_with_a_passphrase_is_not_asked_for_on_the_terminal(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form

    issued = pki.Authority().issue()
    certificate, key = issued.write(tmp_path)
    loaded = form.load_pem_private_key(issued.key, None)
    encryption = form.BestAvailableEncryption(b"open")
    key.write_bytes(
        loaded.private_bytes(form.Encoding.PEM, form.PrivateFormat.TraditionalOpenSSL, encryption)
    )
    with pytest.raises(ConfigError, match="tls_certificate and tls_key: cannot be used"):
        Certificates(certificate, key, None).credentials()
