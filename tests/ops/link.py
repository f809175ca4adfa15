"""A bad network between two network namespaces: packets that come late, out of step, or not at all.

Kernels of CI machines often lack netem, so the link is a process of ours between two TUN devices, one in
each namespace. `python -m tests.ops.link NEAR FAR` runs it; lines on its standard input set what it does.
Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.ops_tools import tool

NEAR, FAR = "198.18.0.1", "198.18.0.2"  # a network reserved for measuring: RFC 2544
_BITS = 24
_MTU = 1400
_SET_DEVICE = 0x400454CA  # TUNSETIFF
_PLAIN_TUN = 0x1001  # IFF_TUN | IFF_NO_PI
_PACKET = 1 << 16
_BURST = 64


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to packets, in each direction."""

    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds that the delay varies by, either way; packets keep their order
    loss: float = 0.0  # part that is dropped; 1: nothing passes


@dataclass
class Link:
    """A running link."""

    near: str
    far: str
    child: asyncio.subprocess.Process

    async def set(self, fault: Fault) -> None:
        """From now on."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(asdict(fault)).encode() + b"\n")
        await self.child.stdin.drain()


def inside(namespace: str) -> tuple[str, ...]:
    """The words before a command that shall run in a namespace."""
    return (str(tool("ip")), "netns", "exec", namespace)


@contextlib.asynccontextmanager
async def link() -> AsyncIterator[Link]:
    """Two namespaces and the link between their addresses NEAR and FAR, until the block ends."""
    near, far = (f"realtide-{os.getpid()}-{side}" for side in ("near", "far"))
    made: list[str] = []
    try:
        for name in (near, far):
            _ip("netns", "add", name)
            made.append(name)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.ops.link", near, far),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert child.stdout is not None
        assert child.stdin is not None
        try:
            assert await child.stdout.readline() == b"ready\n", "the link did not come up"
            yield Link(near, far, child)
        finally:
            child.stdin.close()
            await child.wait()
    finally:
        for name in made:
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run([str(tool("ip")), *words], check=True)


def _device(namespace: str, name: str, address: str) -> int:
    """A TUN device in the namespace; its file descriptor, which stays good wherever the device goes."""
    found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(found, _SET_DEVICE, struct.pack("16sH14x", name.encode(), _PLAIN_TUN))
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "addr", "add", f"{address}/{_BITS}", "dev", name)
    _ip("-n", namespace, "link", "set", name, "up", "mtu", str(_MTU))
    _ip("-n", namespace, "link", "set", "lo", "up")
    return found


def main() -> None:
    """Carry packets until standard input ends."""
    near, far = sys.argv[1:]
    ends = [_device(near, f"rt{os.getpid()}n", NEAR), _device(far, f"rt{os.getpid()}f", FAR)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    last = dict.fromkeys(ends, 0.0)
    fault, count = Fault(), 0
    waiting: list[tuple[float, int, int, bytes]] = []
    print("ready", flush=True)
    commands = sys.stdin.fileno()
    while True:
        wait = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        readable, _, _ = select.select([*ends, commands], [], [], wait)
        for source in readable:
            if source == commands:
                line = sys.stdin.readline()
                if not line:
                    return
                fault = Fault(**json.loads(line))
                continue
            for packet in _packets(source):
                if random.random() < fault.loss:
                    continue
                due = time.monotonic() + fault.delay + random.uniform(-fault.jitter, fault.jitter)
                last[source] = due = max(due, last[source])
                count += 1
                heapq.heappush(waiting, (due, count, other[source], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # as a full queue of a real device
                os.write(target, packet)


def _packets(source: int) -> list[bytes]:
    """What has arrived at a device, but not so much at once that others wait long."""
    found: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while len(found) < _BURST:
            found.append(os.read(source, _PACKET))
    return found


if __name__ == "__main__":
    main()
