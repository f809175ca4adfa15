"""The server keeps off processors that its executors' processes use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from realtide.server import processors
from realtide.server.app import Server
from realtide.server.config import ServerConfig
from realtide.server.remote import RemoteEngine
from tests.server.burst_process import loading
from tests.server.engine import BurstEngine
from tests.server.helpers import DEFAULTS, connected

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")

SCRIPT = """
import os, threading
from realtide.server import processors
count = {count}
before = os.sched_getaffinity(0)
end = threading.Event()
existing = threading.Thread(target=end.wait)
existing.start()
left = processors.leave(count)
later = threading.Thread(target=end.wait)
later.start()
expected = min(count, len(before) - 1)
assert len(left) == expected, left
for thread in os.listdir("/proc/self/task"):
    assert os.sched_getaffinity(int(thread)) == before - left
    assert os.sched_getscheduler(int(thread)) == (os.SCHED_BATCH if left else os.SCHED_OTHER)
assert len(before - left) == processors.usable() >= 1
end.set()
"""


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_all_threads_keep_off_and_one_processor_stays(count: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SCRIPT.format(count=count)], check=True, env=environment)


def test_a_machine_that_forbids_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(thread: int, *what: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5, 7})
    assert processors.leave(2) == {5, 7}
    assert "affinity cannot be set" in caplog.text
    assert "policy cannot be set" in caplog.text


async def test_which_servers_do() -> None:
    here = BurstEngine(model="here")
    async with connected([here]) as (server, _):
        assert server.processors_of_others() == 0
    async with connected([RemoteEngine(loading()) for _ in range(2)], ort_threads=3) as (server, _):
        assert server.processors_of_others() == 6
    # One that computes in this process too needs all of them.
    async with connected([RemoteEngine(loading()), BurstEngine(model="here")]) as (server, _):
        assert server.processors_of_others() == 0
    assert Server(ServerConfig(**DEFAULTS), []).processors_of_others() == 0
