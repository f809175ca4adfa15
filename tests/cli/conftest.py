"""Commands as a user runs them, against real servers with the small engines of the server's tests.

A bundle whose manifest says `engine: bursts` is served by the burst engine, and one that says
`engine: longlive` by the clip engine: a `sitecustomize` module, which Python imports at start, registers them
in every child process.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from realtide import bundle as bundles
from realtide.cli.main import main
from realtide.server.app import Server
from realtide.server.config import ServerConfig
from realtide.server.models import AnyEngine
from tests.server.engine import BurstEngine, quiet, tone
from tests.server.helpers import DEFAULTS
from tests.server.video_engine import ClipEngine

ROOT = Path(__file__).resolve().parents[2]
SITE = """
from realtide.server import loading
loading.ENGINES["bursts"] = "tests.cli.bursts"
loading.ENGINES["longlive"] = "tests.cli.clips"
"""


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `realtide ARGUMENTS` in this process, in an empty directory."""
    for name in [name for name in os.environ if name.startswith("REALTIDE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundles, "search_path", lambda: [Path("models")])

    def command(*arguments: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["realtide", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return command


@dataclass
class Process:
    """What a child process needs to serve bundles of the burst engine."""

    environment: dict[str, str]
    directory: Path

    def line(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "realtide.cli", *map(str, arguments)]


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(root=str(ROOT)))
    paths = (site, ROOT, ROOT / "clients" / "python")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    return Process(dict(os.environ), tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle for the burst engine, where commands find it by themselves."""
    directory = tmp_path / "models" / "bursts"
    directory.mkdir(parents=True)
    (directory / "manifest.yaml").write_text("engine: bursts\nname: bursts\n")
    return directory


@pytest.fixture
def video_bundle(tmp_path: Path) -> Path:
    """A bundle for the clip engine, beside that of `bundle`."""
    directory = tmp_path / "models" / "clips"
    directory.mkdir(parents=True)
    (directory / "manifest.yaml").write_text("engine: longlive\nname: clips\n")
    return directory


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two utterances, of two words and of one, as 16-bit WAV."""
    one = [quiet(0.2), tone(0.2), quiet(0.2), tone(0.2), quiet(1.0), tone(0.2), quiet(0.3)]
    path = tmp_path_factory.mktemp("audio") / "bursts.wav"
    soundfile.write(path, np.concatenate(one), 16000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of speech that runs while the module's tests do."""
    yield from served([BurstEngine()])


@pytest.fixture(scope="module")
def video_address() -> Iterator[str]:
    """A server of video that runs while the module's tests do; a step takes 5 ms."""
    yield from served([ClipEngine(delay=0.005)])


def served(engines: Sequence[AnyEngine], **settings: Any) -> Iterator[str]:
    """A server that runs until the next one is asked for."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(ServerConfig(**(DEFAULTS | settings)), engines)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    yield f"127.0.0.1:{server.port}"
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
