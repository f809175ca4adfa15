"""What `helm test` runs in a pod, against a real server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.server.helpers import running
from tests.server.video_engine import ClipEngine

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "realtide" / "files" / "test.py"


async def run(*arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_it_asks_for_health_and_opens_a_stream_of_each_kind() -> None:
    async with running(more=[ClipEngine()], admin_port=0, admin_host="127.0.0.1") as server:
        admin, port = f"127.0.0.1:{server.server.admin_port}", f"127.0.0.1:{server.server.port}"
        code, output = await run(admin, port)
        assert code == 0, output
        assert f"{admin}: SERVING" in output
        assert "speech: " in output
        assert "video: " in output
        # Where keys or certificates are needed it asks for health only.
        code, output = await run(admin, "")
        assert (code, output) == (0, f"{admin}: SERVING\n")
        server.server.drain()
        await asyncio.sleep(0.1)
        code, output = await run(admin, port)
        assert (code, output) == (1, f"{admin}: NOT_SERVING\n")
