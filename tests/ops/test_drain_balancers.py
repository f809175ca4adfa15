"""Two servers behind a balancer, 20 long streams, and one of the servers is told to stop.

Nobody loses anything: streams of the client library go on with the other server, those of clients that do not
know how to finish in the time they are given or are told where to resume, and new ones never notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import realtide_client as rt
from tests.ops.plain import speaks_plainly
from tests.ops.processes import SPEECH, VIDEO, Running, recognized, server, spoken
from tests.ops.stack import free_port
from tools.ops_tools import tool

pytestmark = pytest.mark.ops

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream realtide {{
    server {a} max_fails=1 fail_timeout=5s;
    server {b} max_fails=1 fail_timeout=5s;
  }}
  server {{
    listen 127.0.0.1:{port} http2;
    http2_max_concurrent_streams 256;
    location / {{
      grpc_pass grpc://realtide;
      grpc_read_timeout 1h;
      grpc_send_timeout 1h;
      client_body_timeout 1h;
      client_max_body_size 0;
      grpc_next_upstream error timeout non_idempotent;
      grpc_socket_keepalive on;
    }}
  }}
}}
"""
HAPROXY = """
defaults
  mode http
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  retries 3
  retry-on conn-failure
  option redispatch 1
frontend entrance
  bind 127.0.0.1:{port} proto h2
  default_backend realtide
backend realtide
  balance roundrobin
  server a {a} proto h2 check inter 200ms
  server b {b} proto h2 check inter 200ms
"""
# Connections instead of streams: each session of the client library has one of its own.
HAPROXY_TCP = (
    HAPROXY.replace("mode http", "mode tcp").replace(" proto h2", "").replace("  retry-on conn-failure\n", "")
)


def _nginx(file: Path) -> list[str]:
    return [str(tool("nginx")), "-c", str(file)]


def _haproxy(file: Path) -> list[str]:
    return [str(tool("haproxy")), "-db", "-f", str(file)]


BALANCERS = {"nginx": (NGINX, _nginx), "haproxy-tcp": (HAPROXY_TCP, _haproxy), "haproxy": (HAPROXY, _haproxy)}
# How a stream ends that stays to the last. HAProxy 2.6 often makes a reset of the error of a stream whose
# client could still send, because gRPC resets it after that; for the library both are reasons to resume.
GONE = {"nginx": {"UNAVAILABLE"}, "haproxy-tcp": {"UNAVAILABLE"}, "haproxy": {"UNAVAILABLE", "CANCELLED"}}
# Recordings, streams of each kind, and frames of a video.
SAID, SPEECHES, PLAIN, VIDEOS, FRAMES = 2, 10, 4, 6, 144
DRAIN = 12.0


@contextlib.asynccontextmanager
async def balancer(name: str, folder: Path, a: Running, b: Running) -> AsyncIterator[str]:
    """Run one in front of two servers; gives its address."""
    text, command = BALANCERS[name]
    port = free_port()
    file = folder / f"{name}.conf"
    file.write_text(text.format(folder=folder, port=port, a=a.address, b=b.address))
    with (folder / f"{name}.out").open("w") as out:
        child = await asyncio.create_subprocess_exec(*command(file), stdout=out, stderr=out)
    try:
        async with asyncio.timeout(30):
            while True:
                assert child.returncode is None, (folder / f"{name}.out").read_text()
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


async def says(client: rt.Client, samples: Any, rate: int) -> tuple[list[str], int]:
    async with client.speech(sample_rate=rate, checkpoint_interval_ms=2000) as stream:
        return await recognized(stream, samples, rate, 1.0), stream.reconnects


async def watches(client: rt.Client, seed: int) -> tuple[int, int]:
    """Take a video at 6 frames a second, whatever the model's rate is; every frame comes once, in order."""
    prompt = "a red apple moves up on a blue background"
    settings: dict[str, Any] = {"encoding": "jpeg", "length_frames": FRAMES, "buffer_seconds": 1.0}
    taken = 0
    async with client.video(prompt=prompt, seed=seed, **settings) as stream:
        async for event in stream:
            if isinstance(event, rt.Frames):
                assert event.position == taken
                taken += event.count
                await asyncio.sleep(event.count / 6)
        return taken, stream.reconnects


@pytest.mark.parametrize("name", BALANCERS)
async def test_one_of_two_servers_is_stopped_under_twenty_streams(name: str, tmp_path: Path) -> None:
    samples, rate = spoken(SAID)
    settings = {"slots": 32, "video_slots": 12, "drain_seconds": DRAIN, "grace_seconds": 2.0}
    async with (
        server(tmp_path / "a", SPEECH, VIDEO, settings=settings) as a,
        server(tmp_path / "b", SPEECH, VIDEO, settings=settings) as b,
        balancer(name, tmp_path, a, b) as address,
        rt.connect(address) as client,
    ):
        async with rt.connect(b.address) as direct, direct.speech(sample_rate=rate) as stream:
            expected = await recognized(stream, samples, rate, 50.0)
        assert len([text for text in expected if text]) >= SAID

        speeches = [asyncio.create_task(says(client, samples, rate)) for _ in range(SPEECHES)]
        plain = [
            asyncio.create_task(speaks_plainly(address, samples, rate, leaves=leaves))
            for leaves in (True, True, False, False)
        ]
        videos = [asyncio.create_task(watches(client, seed)) for seed in range(VIDEOS)]
        async with asyncio.timeout(60):
            while await opened(a) + await opened(b) < 1 + SPEECHES + PLAIN + VIDEOS:
                await asyncio.sleep(0.2)
        at_a = int(await a.metric("realtide_sessions", state="active"))
        assert 0 < at_a < SPEECHES + PLAIN + VIDEOS
        await asyncio.sleep(3)

        a.child.send_signal(signal.SIGTERM)
        # New ones. A stream that a balancer sends over a connection of its own in the very moment in which
        # that closes is reset, and tried again by the library; afterwards nobody has to try twice.
        short = samples[: round(1.5 * rate)]
        for retry in (None, rt.RetryPolicy(max_retries=0)):
            for _ in range(10):
                async with client.speech(sample_rate=rate, retry=retry) as stream:
                    await recognized(stream, short, rate, 50.0)
            await refuses(a)
        assert await a.ends(DRAIN + 60) == 0

        heard = await asyncio.gather(*speeches)
        assert [texts for texts, _ in heard] == [expected] * SPEECHES
        seen = await asyncio.gather(*videos)
        assert [taken for taken, _ in seen] == [FRAMES] * VIDEOS
        moved = sum(reconnects for _, reconnects in (*heard, *seen))
        told = await asyncio.gather(*plain)
        away = [kinds for kinds, _ in told if "going_away" in kinds]
        assert moved + len(away) == at_a  # whoever was there was told, and nobody else had to move
        for leaves, (kinds, code) in zip((True, True, False, False), told, strict=True):
            if leaves or "going_away" not in kinds:
                assert code == "OK", kinds
                assert "final" in kinds
            else:
                assert kinds[-1] == "checkpoint"
                assert code in GONE[name], kinds
        late = [line["message"] for line in a.lines()]
        assert "session opened" not in late[late.index("draining") :]
        assert late[-1] == "stopped"
        assert await b.metric("realtide_slots_leaked") == 0
        assert await b.metric("realtide_sessions", state="active") == 0
        assert await b.metric("realtide_sessions_closed_total", outcome="server_error") == 0


async def refuses(one: Running) -> None:
    """Wait until its port is closed."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection(one.host, one.ready["port"])
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.05)


async def opened(one: Running) -> float:
    return await one.metric("realtide_sessions_opened_total")
