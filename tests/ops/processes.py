"""Servers and other programs as processes, for tests that need them as they are in production."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import soundfile
from prometheus_client.parser import text_string_to_metric_families

from realtide_client import Final, SpeechStream

ROOT = Path(__file__).resolve().parents[2]
SPEECH, VIDEO = (ROOT / "models" / name for name in ("ancat-commands-en", "longlive-emoji"))
_BLOCK = 0.1


@dataclass
class Running:
    """A server process."""

    child: asyncio.subprocess.Process
    ready: dict[str, Any]
    log: Path
    host: str
    prefix: Sequence[str]

    @property
    def address(self) -> str:
        return f"{self.host}:{self.ready['port']}"

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = await scraped(f"http://{self.host}:{self.ready['metrics_port']}/metrics", self.prefix)
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def ends(self, seconds: float) -> int:
        """Wait for its end; the exit status."""
        async with asyncio.timeout(seconds):
            return await self.child.wait()


_GET = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1], timeout=30).read())"


async def scraped(url: str, prefix: Sequence[str]) -> str:
    """The page at `url` as a process sees it that runs behind `prefix`."""
    words = (*prefix, sys.executable, "-c", _GET, url)
    child = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
    output, _ = await child.communicate()
    assert child.returncode == 0
    return output.decode()


@contextlib.asynccontextmanager
async def server(
    folder: Path,
    *bundles: Path,
    prefix: Sequence[str] = (),
    host: str = "127.0.0.1",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> AsyncIterator[Running]:
    """Run `realtide serve` until the block ends; its log goes into `folder`.

    Args:
        folder: made if it is not there.
        bundles: what it serves.
        prefix: words before the command, of a program that runs it somewhere else.
        host: where it listens.
        settings: of the server.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    flags = {"host": host, "metrics_host": host, "port": 0, "metrics_port": 0, "log_format": "json"}
    flags |= settings
    words = [word for name, value in flags.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REALTIDE_")}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (folder / "log").open("w") as log:
        child = await asyncio.create_subprocess_exec(
            *prefix,
            *(sys.executable, "-m", "realtide.cli", "serve", *map(str, bundles), *words),
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            env=environment | threads | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert child.stdout is not None
            async with asyncio.timeout(120):
                line = await child.stdout.readline()
            assert line, (folder / "log").read_text()
            yield Running(child, json.loads(line), folder / "log", host, prefix)
        finally:
            if child.returncode is None:
                child.kill()
            await child.wait()


def spoken(
    times: int, gap: float = 1.5, names: tuple[str, ...] = ("coffee-mocha", "coffee-almond")
) -> tuple[Any, int]:
    """Recordings in turn, so many times, with `gap` seconds of silence after each; and their rate."""
    pieces: list[Any] = []
    for name in names * times:
        samples, rate = soundfile.read(ROOT / f"tests/data/audio/{name}.flac", dtype="float32")
        pieces += [samples, np.zeros(round(gap * rate), dtype=np.float32)]
    return np.concatenate(pieces), int(rate)


async def recognized(stream: SpeechStream, samples: Any, rate: int, pace: float) -> list[str]:
    """Send `samples` at `pace` times the speed at which they were spoken; the texts of all finals."""

    async def send() -> None:
        size = round(_BLOCK * rate)
        due = asyncio.get_running_loop().time()
        for start in range(0, len(samples), size):
            await stream.send(samples[start : start + size])
            due += _BLOCK / pace
            await asyncio.sleep(max(due - asyncio.get_running_loop().time(), 0.0))
        await stream.finish()

    sending = asyncio.create_task(send())
    try:
        return [event.text async for event in stream if isinstance(event, Final)]
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
