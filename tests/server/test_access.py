"""Who is let in: keys, certificates, services, quotas. What is refused takes no slot and is not told why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from realtide.server import access, keyfile
from realtide.server.access import Access
from realtide.server.config import ConfigError, ServerConfig
from realtide.server.metrics import CALL_REFUSALS, Metrics
from realtide.server.status import StatusError
from realtide_client.v1 import (
    image_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    speech_pb2_grpc,
    video_pb2_grpc,
)
from tests.engines.easycontrol.small import Small
from tests.server import image_helpers, pki, video_helpers
from tests.server.engine import BurstEngine
from tests.server.helpers import Running, failure, finish, opening, responses, retry_seconds, running, until
from tests.server.video_engine import ClipEngine

Code = grpc.StatusCode
SPEECH_METHOD = "/realtide.v1.Speech/Stream"


@dataclass(frozen=True)
class Door:
    """A file of keys, and the keys."""

    file: Path
    keys: dict[str, keyfile.Key]

    def __getitem__(self, name: str) -> str:
        return self.keys[name].text


def door(folder: Path, **entries: dict[str, Any]) -> Door:
    """Make one key for each name, with those fields of its entry."""
    made = Door(folder / "keys.yaml", {name: keyfile.Key.new() for name in entries})
    rewrite(made, **entries)
    return made


def rewrite(made: Door, **entries: dict[str, Any]) -> None:
    """Replace the file by one of these."""
    keyfile.write(
        made.file,
        [
            keyfile.parse_entry({"id": made.keys[name].id, "hash": made.keys[name].hash(None)} | fields)
            for name, fields in entries.items()
        ],
    )


def bearing(text: str | None) -> tuple[tuple[str, str], ...]:
    return () if text is None else (("authorization", f"Bearer {text}"),)


def refused(server: Running) -> dict[str, float]:
    """Calls that were refused, by reason; those that were none are left out."""
    read = server.server.metrics.registry.get_sample_value
    found = {one: read("realtide_calls_refused_total", {"reason": one}) or 0.0 for one in CALL_REFUSALS}
    return {reason: count for reason, count in found.items() if count}


KINDS: dict[str, tuple[Callable[[grpc.aio.Channel], Any], Callable[[], Message]]] = {
    "speech": (speech_pb2_grpc.SpeechStub, opening),
    "video": (video_pb2_grpc.VideoStub, video_helpers.opening),
    "image": (image_pb2_grpc.ImageStub, image_helpers.opening),
}


def stream(channel: grpc.aio.Channel, key: str | None, kind: str = "speech") -> tuple[Any, Message]:
    """A call that was begun, and the message that would open its session."""
    stub, first = KINDS[kind]
    return stub(channel).Stream(metadata=bearing(key)), first()


async def opened(channel: grpc.aio.Channel, key: str | None, kind: str = "speech") -> Any:
    call, first = stream(channel, key, kind)
    await call.write(first)
    response = await call.read()
    assert response.WhichOneof("message") == "opened"
    return call


async def turned_away(channel: grpc.aio.Channel, key: str | None, kind: str = "speech") -> Any:
    """Nothing is sent: whoever is refused is so before a first message."""
    call, _ = stream(channel, key, kind)
    return await failure(call)


async def listed(channel: grpc.aio.Channel, key: str | None) -> list[str]:
    stub: Any = models_pb2_grpc.ModelsStub(channel)
    response = await stub.ListModels(models_pb2.ListModelsRequest(), metadata=bearing(key), timeout=10)
    return [model.name for model in response.models]


async def test_the_matrix(tmp_path: Path) -> None:
    authority, strangers = pki.Authority(), pki.Authority()
    made = door(
        tmp_path,
        good={},
        speaker={"services": ["speech"]},
        expired={"expires": datetime.now(UTC) - timedelta(seconds=1)},
        one={"sessions": 1},
        slow={"opens_per_minute": 1},
    )
    certificate, private = authority.issue().write(tmp_path)
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots)
    settings: dict[str, Any] = {
        "tls_certificate": certificate,
        "tls_key": private,
        "tls_client_ca": roots,
        "api_key_file": made.file,
    }
    more: list[Any] = [ClipEngine(), Small().engine]
    async with running(more=more, **settings) as server:
        port = server.server.port
        async with pki.channel(port, authority.roots, authority.issue("client")) as channel:
            # Without a key that holds: one status and one text, whatever is wrong.
            unknown = keyfile.Key.new().text
            wrong = f"rt_{made.keys['good'].id}_{keyfile.Key.new().secret}"
            texts = set()
            for key in (None, "", "password", unknown, wrong, made["expired"]):
                for kind in KINDS:
                    error = await turned_away(channel, key, kind)
                    assert error.code() == Code.UNAUTHENTICATED, key
                    texts.add(error.details())
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await listed(channel, key)
                assert caught.value.code() == Code.UNAUTHENTICATED
                texts.add(caught.value.details())
            assert texts == {"authentication failed"}
            assert refused(server) == {"no_key": 4, "wrong_key": 16, "expired_key": 4}

            # A key of another service.
            (await opened(channel, made["speaker"])).cancel()
            for kind in ("video", "image"):
                error = await turned_away(channel, made["speaker"], kind)
                assert error.code() == Code.PERMISSION_DENIED
                assert error.details() == "not allowed with this key"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await listed(channel, made["speaker"])
            assert caught.value.code() == Code.PERMISSION_DENIED
            assert refused(server)["forbidden_service"] == 3

            # Over quota, of sessions at once (of all kinds together) and of sessions begun.
            held = await opened(channel, made["one"])
            for kind in KINDS:
                error = await turned_away(channel, made["one"], kind)
                assert error.code() == Code.RESOURCE_EXHAUSTED
                assert retry_seconds(error) == 1.0
            await held.write(finish())
            await responses(held)
            (await opened(channel, made["one"], "video")).cancel()
            (await opened(channel, made["slow"])).cancel()
            error = await turned_away(channel, made["slow"])
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert 50.0 < retry_seconds(error) <= 60.0
            assert {"client_sessions": 3, "client_rate": 1}.items() <= refused(server).items()

            assert len(await listed(channel, made["good"])) == len(KINDS)
            before = sum(refused(server).values())

        # Nobody who does not get through the handshake is told anything by the server, nor is a call counted.
        handshakes = {
            "no certificate": pki.channel(port, authority.roots),
            "of strangers": pki.channel(port, authority.roots, strangers.issue("client")),
            "expired": pki.channel(port, authority.roots, authority.issue("client", expires=pki.YESTERDAY)),
            "server not known": pki.channel(port, strangers.roots, authority.issue("client")),
            "plain text": grpc.aio.insecure_channel(f"127.0.0.1:{port}"),
        }
        started = calls_started(server)
        for what, channel in handshakes.items():
            async with channel:
                error = await turned_away(channel, made["good"])
            assert error.code() == Code.UNAVAILABLE, what
        assert (calls_started(server), sum(refused(server).values())) == (started, before)

        await server.all_free()
        assert server.metric("realtide_admission_refused_total", reason="queue_full") == 0
        async with pki.channel(port, authority.roots, authority.issue("client")) as channel:
            await (await opened(channel, made["good"])).write(finish())


def calls_started(server: Running) -> float:
    labels = {"grpc_type": "bidi_stream", "grpc_service": "realtide.v1.Speech", "grpc_method": "Stream"}
    return server.server.metrics.registry.get_sample_value("grpc_server_started_total", labels) or 0.0


async def test_refused_calls_take_no_slot_of_a_full_server(tmp_path: Path) -> None:
    made = door(tmp_path, good={}, other={})
    async with running(BurstEngine(slots=1), api_key_file=made.file, queue_limit=1) as server:
        held = await opened(server.channel, made["good"])
        waiting, first = stream(server.channel, made["other"])
        await waiting.write(first)
        await until(lambda: server.server.host.models["bursts"].admission.queued == 1)
        for _ in range(20):
            assert (await turned_away(server.channel, None)).code() == Code.UNAUTHENTICATED
        assert server.server.host.models["bursts"].admission.queued == 1
        held.cancel()
        assert (await waiting.read()).WhichOneof("message") == "opened"
        waiting.cancel()
        await server.all_free()


async def test_many_that_give_up_leave_no_count_behind(tmp_path: Path) -> None:
    made = door(tmp_path, few={"sessions": 3})
    async with running(api_key_file=made.file) as server:
        for _ in range(5):
            calls = [await opened(server.channel, made["few"]) for _ in range(3)]
            assert (await turned_away(server.channel, made["few"])).code() == Code.RESOURCE_EXHAUSTED
            for call in calls:
                call.cancel()
            await server.all_free()
            await until(lambda: not server.server.host.streams)
        # One that never says what it wants counts too.
        silent = [stream(server.channel, made["few"])[0] for _ in range(3)]
        await until(lambda: len(server.server.host.streams) == 3)
        assert (await turned_away(server.channel, made["few"])).code() == Code.RESOURCE_EXHAUSTED
        for call in silent:
            call.cancel()


async def test_a_revoked_key_ends_its_sessions_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_WATCH_SECONDS", 0.02)
    made = door(tmp_path, stays={}, goes={}, later={})
    async with running(api_key_file=made.file) as server:
        stays, goes = [await opened(server.channel, made[name]) for name in ("stays", "goes")]
        rewrite(made, stays={}, later={})
        error = await failure(goes)
        assert (error.code(), error.details()) == (Code.UNAUTHENTICATED, "authentication failed")
        assert (await turned_away(server.channel, made["goes"])).code() == Code.UNAUTHENTICATED
        # A file that cannot be used changes nothing.
        made.file.write_text("keys: [{id: 1}]")
        read = server.server.metrics.registry.get_sample_value
        await until(lambda: read("realtide_reload_failures_total", {"file": "api_keys"}) == 1)
        (await opened(server.channel, made["later"])).cancel()
        # Expiry is looked at while a session runs.
        later = await opened(server.channel, made["later"])
        rewrite(made, stays={}, later={"expires": datetime.now(UTC) + timedelta(seconds=0.5)})
        assert (await failure(later)).code() == Code.UNAUTHENTICATED
        await stays.write(finish())
        await responses(stays)
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == 2


async def test_without_keys_a_client_is_its_certificate_or_its_address(tmp_path: Path) -> None:
    async with running(max_client_sessions=1) as server:
        held = await opened(server.channel, None)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.server.port}") as same:
            assert (await turned_away(same, None)).code() == Code.RESOURCE_EXHAUSTED
            assert await listed(same, None) == ["bursts"]  # only sessions are counted
        held.cancel()
    authority = pki.Authority()
    certificate, private = authority.issue().write(tmp_path)
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots)
    settings: dict[str, Any] = {"tls_certificate": certificate, "tls_key": private, "tls_client_ca": roots}
    async with running(max_client_sessions=1, **settings) as server:
        port = server.server.port
        async with (
            pki.channel(port, authority.roots, authority.issue("one")) as first,
            pki.channel(port, authority.roots, authority.issue("two")) as second,
        ):
            calls = [await opened(first, None), await opened(second, None)]
            assert (await turned_away(first, None)).code() == Code.RESOURCE_EXHAUSTED
            names = {stream.caller.name for stream in server.server.host.streams if stream.caller}
            assert names == {"certificate:one", "certificate:two"}
            for call in calls:
                call.cancel()


async def test_health_needs_no_key_and_reflection_does(tmp_path: Path) -> None:
    made = door(tmp_path, good={"services": ["speech"]})
    async with running(api_key_file=made.file) as server:
        assert await healthy(server.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(server.channel, None)
        assert caught.value.code() == Code.UNAUTHENTICATED
        assert "realtide.v1.Video" in await reflected(server.channel, made["good"])


async def test_the_admin_port_has_health_and_reflection_and_nothing_else(tmp_path: Path) -> None:
    made = door(tmp_path, good={})
    certificate, private = pki.Authority().issue().write(tmp_path)
    settings: dict[str, Any] = {"tls_certificate": certificate, "tls_key": private, "api_key_file": made.file}
    async with running(admin_host="127.0.0.1", admin_port=0, **settings) as server:
        assert server.server.ready()["admin_port"] == server.server.admin_port
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.server.admin_port}") as admin:
            assert await healthy(admin)
            assert "realtide.v1.Speech" in await reflected(admin, None)
            error = await turned_away(admin, made["good"])
            assert error.code() == Code.UNIMPLEMENTED
            server.server.drain()
            async with asyncio.timeout(10):
                while await healthy(admin):
                    await asyncio.sleep(0.005)
    async with running(admin_host="127.0.0.1", admin_port=0) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(server.channel, None)
        assert caught.value.code() == Code.UNIMPLEMENTED


async def healthy(channel: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return bool((await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1)


async def reflected(channel: grpc.aio.Channel, key: str | None) -> set[str]:
    """Services by reflection."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(metadata=bearing(key))
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    if answer is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise AssertionError(await call.code())
    call.cancel()
    return {one.name for one in answer.list_services_response.service}


async def test_logs_name_the_key_and_hold_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = door(tmp_path, good={}, one={"sessions": 1})
    with caplog.at_level(logging.DEBUG):
        async with running(api_key_file=made.file) as server:
            call = await opened(server.channel, made["good"])
            held = await opened(server.channel, made["one"])
            await turned_away(server.channel, made["one"])
            for _ in range(30):
                await turned_away(server.channel, keyfile.Key.new().text)
            for one in (call, held):
                one.cancel()
            door_of(server).look(())
            door_of(server).look(())
    said = [record.__dict__ for record in caplog.records]
    assert {one.get("client") for one in said} >= {f"key:{key.id}" for key in made.keys.values()}
    # However many are refused, it is one line.
    (line,) = [one for one in said if one["message"] == "calls refused"]
    assert line["refused"] == {"wrong_key": 30, f"client_sessions {made.keys['one'].id}": 1}
    assert any("without TLS" in one["message"] for one in said)
    for key in made.keys.values():
        assert all(key.secret not in str(one) and key.hash(None) not in str(one) for one in said)


def door_of(server: Running) -> Access:
    assert server.server.access is not None
    return server.server.access


class Context:
    """Of a call without a network."""

    def __init__(self, key: str | None = None, peer: str = "ipv4:10.0.0.1:5", more: Any = ()) -> None:
        self._metadata = (*bearing(key), *more)
        self._peer = peer

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return self._peer


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_opens_refill_steadily() -> None:
    clock = Clock()
    guard = Access(ServerConfig(client_opens_per_minute=6), Metrics("0"), clock)

    def tries(count: int) -> int:
        """How many of so many sessions may be begun now."""
        begun = 0
        for _ in range(count):
            try:
                with guard.enter(SPEECH_METHOD, True, Context()):
                    begun += 1
            except StatusError as error:
                assert error.code == Code.RESOURCE_EXHAUSTED  # noqa: PT017
        return begun

    assert tries(10) == 6
    clock.now += 9.9
    assert tries(3) == 0
    clock.now += 0.2
    assert tries(3) == 1
    clock.now += 30
    guard.look(())
    assert tries(10) == 3  # what was spent is not forgotten while it matters
    clock.now += 600
    guard.look(())
    assert guard.clients == 0
    assert tries(10) == 6


def test_addresses_are_told_apart_without_their_ports() -> None:
    guard = Access(ServerConfig(max_client_sessions=1), Metrics("0"))
    with guard.enter(SPEECH_METHOD, True, Context(peer="ipv6:[2001:db8::1]:5")):
        for peer in ("ipv6:[2001:db8::2]:5", "ipv4:10.0.0.1:5", "unix:/run/realtide.sock"):
            with guard.enter(SPEECH_METHOD, True, Context(peer=peer)):
                pass
        with pytest.raises(StatusError):
            guard.enter(SPEECH_METHOD, True, Context(peer="ipv6:[2001:db8::1]:6"))


def test_one_authorization_only(tmp_path: Path) -> None:
    made = door(tmp_path, good={})
    guard = Access(ServerConfig(api_key_file=made.file), Metrics("0"))
    bearer = ("authorization", f"bearer {made['good']}")
    with guard.enter(SPEECH_METHOD, True, Context(more=[bearer])):
        pass
    for more in ([bearer, bearer], [("authorization", made["good"])], [("authorization", "Basic x")]):
        with pytest.raises(StatusError) as caught:
            guard.enter(SPEECH_METHOD, True, Context(more=more))
        assert caught.value.code == Code.UNAUTHENTICATED


def test_a_file_that_cannot_be_used_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: 1")
    with pytest.raises(ConfigError, match="api_key_file"):
        Access(ServerConfig(api_key_file=file), Metrics("0"))
