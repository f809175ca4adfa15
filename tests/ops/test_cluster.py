"""The chart in a real cluster: install, an update under live streams, one that cannot work, rollback.

Not part of `make ops-test`, because it needs a cluster: the one that kubectl talks to. It runs where the
addresses of pods can be reached, on a node for example. Two tags of one image must be there:

    make ops-test ARGS="-m cluster tests/ops/test_cluster.py --image REPOSITORY --tags v1,v2"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile

import realtide_client as rt
from tests.ops.load import BLOCK_SECONDS, RECORDING
from tests.ops.stack import ROOT, until
from tools.ops_tools import tool

pytestmark = pytest.mark.cluster

STREAMS = 6
WORDS = "can i get a light roast iced mocha with some sugar"
RELEASE = "live"
NAME = "live-realtide-main"


def helm(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([tool("helm"), *map(str, arguments)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def kubectl(*arguments: object) -> Any:
    """What kubectl says, as JSON."""
    command = [str(word) for word in (tool("kubectl"), *arguments, "--output", "json")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Cluster:
    """A namespace with the chart in it."""

    def __init__(self, repository: str, tags: list[str]) -> None:
        self.namespace = f"realtide-{uuid.uuid4().hex[:8]}"
        self.repository = repository
        self.tags = tags

    def release(self, command: str, tag: str, *more: str, check: bool = True) -> str:
        """`helm install` or `helm upgrade`, and wait for it."""
        values = {
            "image.repository": self.repository,
            "image.tag": tag,
            "image.pullPolicy": "Never",
            "defaults.drainSeconds": 20,
            "defaults.config.slots": STREAMS,
            "defaults.models[0]": "ancat-commands-en",
            "defaults.resources.requests.cpu": "50m",
            "defaults.resources.requests.memory": "64Mi",
        }
        words = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
        done = helm(
            command, RELEASE, ROOT / "deploy/helm/realtide", "--namespace", self.namespace, *words, "--wait",
            *(["--create-namespace"] if command == "install" else []), "--server-side=false", *more,
            check=check,
        )  # fmt: skip
        return done.stdout + done.stderr

    def endpoints(self) -> list[str]:
        """Addresses of the pods that the Service sends streams to."""
        found = kubectl("get", "endpoints", NAME, "--namespace", self.namespace)
        return [
            f"{one['ip']}:50051" for subset in found.get("subsets", []) for one in subset.get("addresses", [])
        ]

    def images(self) -> Counter[str]:
        """Images of the pods that are ready."""
        pods = kubectl(
            "get", "pods", "--namespace", self.namespace, "--selector", "app.kubernetes.io/component=main"
        )
        return Counter(
            pod["spec"]["containers"][0]["image"]
            for pod in pods["items"]
            if "deletionTimestamp" not in pod["metadata"] and pod["status"]["containerStatuses"][0]["ready"]
        )


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    tags = request.config.getoption("--tags").split(",")
    cluster = Cluster(request.config.getoption("--image"), tags)
    try:
        cluster.release("install", tags[0], "--timeout", "5m")
        yield cluster
    finally:
        helm("uninstall", RELEASE, "--namespace", cluster.namespace, check=False)
        command = [str(tool("kubectl")), "delete", "namespace", cluster.namespace, "--wait=false"]
        subprocess.run(command, check=False, capture_output=True)


class Balancer:
    """Sends each new connection to the next pod that is an endpoint then, as a Service does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.turn = 0
        self.address = ""
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for writer in list(self._writers):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pods = await asyncio.to_thread(self.cluster.endpoints)
        self.turn += 1
        try:
            host, port = pods[self.turn % len(pods)].split(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except (OSError, ZeroDivisionError):
            writer.close()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def speak(address: str, stop: asyncio.Event) -> tuple[str, int]:
    """Say the recording, be silent until `stop`, and finish: what was understood, reconnections."""
    samples, rate = await asyncio.to_thread(soundfile.read, RECORDING, dtype="float32")
    block = round(BLOCK_SECONDS * rate)
    silence = np.zeros(block, np.float32)
    async with rt.connect(address) as client, client.speech(sample_rate=rate) as stream:

        async def send() -> None:
            for start in range(0, len(samples), block):
                await stream.send(samples[start : start + block])
                await asyncio.sleep(BLOCK_SECONDS)
            while not stop.is_set():
                await stream.send(silence)
                await asyncio.sleep(BLOCK_SECONDS)
            await stream.finish()

        sending = asyncio.create_task(send())
        texts = [item.text async for item in stream if isinstance(item, rt.Final)]
        await sending
        return " ".join(texts).strip(), stream.reconnects


async def short(address: str) -> None:
    """A new stream: a second of silence. Raises RealtideError if it cannot be had."""
    async with rt.connect(address) as client, client.speech(sample_rate=16000) as stream:
        await stream.send(np.zeros(16000, np.float32))
        await stream.finish()
        async for _ in stream:
            pass


async def under_streams(cluster: Cluster, change: Any) -> tuple[list[tuple[str, int]], int]:
    """Run `change()` while streams go on and new ones come; results of the long ones, number of the new."""
    async with Balancer(cluster).running() as balancer:
        stop = asyncio.Event()
        long = [asyncio.create_task(speak(balancer.address, stop)) for _ in range(STREAMS)]
        await asyncio.sleep(2)
        changing = asyncio.create_task(asyncio.to_thread(change))
        opened = 0
        while not changing.done():
            await short(balancer.address)
            opened += 1
            await asyncio.sleep(0.5)
        await changing
        # The old pods drain for up to 20 s after the new ones are ready.
        await asyncio.sleep(25)
        stop.set()
        return list(await asyncio.gather(*long)), opened


def test_it_is_installed(cluster: Cluster) -> None:
    until("two pods are ready", lambda: len(cluster.endpoints()) == 2)
    assert set(cluster.images()) == {f"{cluster.repository}:{cluster.tags[0]}"}


def test_an_update_cuts_no_stream(cluster: Cluster) -> None:
    done, opened = asyncio.run(
        under_streams(cluster, lambda: cluster.release("upgrade", cluster.tags[1], "--timeout", "5m"))
    )
    assert [text for text, _ in done] == [WORDS] * STREAMS
    assert all(reconnects >= 1 for _, reconnects in done), done
    assert opened > 0
    until("only new pods", lambda: set(cluster.images()) == {f"{cluster.repository}:{cluster.tags[1]}"})


def test_an_update_that_cannot_start_leaves_the_old_pods_at_work(cluster: Cluster) -> None:
    said = cluster.release("upgrade", "no-such-tag", "--timeout", "20s", check=False)
    assert "rror" in said
    assert cluster.images() == {f"{cluster.repository}:{cluster.tags[1]}": 2}
    address = cluster.endpoints()[0]
    asyncio.run(short(address))


def test_rollback_goes_back_and_cuts_no_stream(cluster: Cluster) -> None:
    def rollback() -> None:
        helm(
            "rollback", RELEASE, "1", "--namespace", cluster.namespace, "--wait", "--server-side=false",
            "--timeout", "5m",
        )  # fmt: skip

    done, _ = asyncio.run(under_streams(cluster, rollback))
    assert [text for text, _ in done] == [WORDS] * STREAMS
    until("only old pods", lambda: set(cluster.images()) == {f"{cluster.repository}:{cluster.tags[0]}"})
