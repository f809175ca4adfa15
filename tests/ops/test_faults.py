"""A minute of load over a network that is slow, then loses packets, then is cut, then is well again."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.ops.link import FAR, Fault, inside, link
from tests.ops.processes import ROOT, SPEECH, VIDEO, Running, server

pytestmark = pytest.mark.ops

# Seconds, and what happens in them.
MINUTE = (
    (14.0, Fault(delay=0.04, jitter=0.02)),
    (14.0, Fault(delay=0.02, loss=0.03)),
    (18.0, Fault(loss=1.0)),
    (14.0, Fault()),
)
SETTINGS = {
    "slots": 16,
    "video_slots": 6,
    # So that a connection that is cut is noticed within 5 seconds.
    "keepalive_seconds": 2.0,
    "keepalive_timeout": 3.0,
    "drain_seconds": 0.0,
}
# Memory after the minute, over that of its first part, in which every kind of session has been.
FLAT = 1.1


async def test_a_minute_of_faults(tmp_path: Path) -> None:
    async with (
        link() as between,
        server(tmp_path, SPEECH, VIDEO, prefix=inside(between.far), host=FAR, settings=SETTINGS) as running,
    ):
        load = await asyncio.create_subprocess_exec(
            *inside(between.near),
            *(sys.executable, "-m", "tests.ops.fault_load", running.address),
            str(sum(seconds for seconds, _ in MINUTE)),
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        try:
            memory = []
            for seconds, fault in MINUTE:
                await between.set(fault)
                await asyncio.sleep(seconds)
                memory.append(await resident(running))
                if fault.loss == 1.0:
                    # Nobody has said goodbye, and all slots are free.
                    assert await running.metric("realtide_sessions", state="active") == 0
                    assert await running.metric("realtide_sessions_closed_total", outcome="cancelled") > 0
            async with asyncio.timeout(120):
                output, _ = await load.communicate()
        finally:
            if load.returncode is None:
                load.kill()
                await load.wait()
        memory.append(await resident(running))
        found = json.loads(output)

        speeches = [one for one in found if one["kind"] == "speech"]
        videos = [one for one in found if one["kind"] == "video"]
        plain = [one for one in found if one["kind"] == "plain"]
        moves = [sum(one["reconnects"] for one in kind) for kind in (speeches, videos)]
        codes = Counter(one["code"] for one in plain)
        print(f"{len(speeches)} speech, {len(videos)} video, resumed {moves}; plain {codes}; memory {memory}")
        assert [one for one in found if one["kind"] == "failed"] == []
        # Whoever was cut off went on; nothing was lost, and nothing came twice.
        assert min(len(speeches), len(videos), len(plain)) >= 4
        texts = {tuple(text for text in one["given"] if text) for one in speeches}
        assert texts == {("can i get a light roast iced mocha with some sugar",)}
        assert all(one["given"] for one in videos)
        assert min(moves) >= 1
        # Whoever does not try again is told what has happened.
        ends = {(one["code"], one["given"] == "final") for one in plain}
        assert ends >= {("OK", True)}
        assert set(codes) == {"OK", "UNAVAILABLE"}

        assert memory[-1] <= FLAT * memory[0], memory
        assert await running.metric("realtide_sessions", state="active") == 0
        assert await running.metric("realtide_slots_leaked") == 0
        assert await running.metric("realtide_sessions_closed_total", outcome="server_error") == 0
        assert [line for line in running.lines() if line["level"] == "error"] == []


async def resident(running: Running) -> float:
    return await running.metric("process_resident_memory_bytes")
