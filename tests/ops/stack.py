"""Real programs as child processes (server, Prometheus, Alertmanager), and a webhook that gets alerts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tools.ops_tools import tool

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = ("objectives.yaml", "recording.yaml", "alerts.yaml")
Value = TypeVar("Value")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, read: Callable[[], Value], seconds: float = 90.0) -> Value:
    """The first true value of `read()`. Raises AssertionError after a generous time."""
    end = time.monotonic() + seconds
    while True:
        value = read()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.25)


def get(url: str, **query: str) -> Any:
    """A JSON reply; None if nobody answers yet."""
    if query:
        url += "?" + urllib.parse.urlencode(query)
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
    return json.loads(text) if text.startswith(b"{") else text.decode()


@contextlib.contextmanager
def process(arguments: Sequence[object], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, asked to end and then made to; its output goes to `log`."""
    with log.open("wb") as file:
        child = subprocess.Popen([str(word) for word in arguments], stdout=file, stderr=file, **options)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def server(
    directory: Path, *settings: str, name: str = "server"
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """`realtide serve` of the bundled models; its ports are in ``directory/NAME.json`` when it is ready."""
    words = [word for setting in settings for word in ("--set", setting)]
    file = directory / f"{name}.json"
    file.unlink(missing_ok=True)
    return process(
        [sys.executable, "-m", "realtide.cli", "serve", "--host", "127.0.0.1", "--log-format", "json",
         "--set", "metrics_host=127.0.0.1", "--set", f"port_file={file}", *words],
        directory / f"{name}.log",
        env=_environment(),
        cwd=ROOT,
    )  # fmt: skip


def image_server(
    directory: Path, metrics_port: int
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The same for the small image engine of the tests, as ``images``."""
    file = directory / "images.json"
    file.unlink(missing_ok=True)
    settings = {
        "host": "127.0.0.1",
        "port": 0,
        "metrics_host": "127.0.0.1",
        "metrics_port": metrics_port,
        "port_file": str(file),
        "drain_seconds": 0,
    }
    return process(
        [sys.executable, "-m", "tests.ops.serve_images", json.dumps(settings)],
        directory / "images.log",
        env=_environment(),
        cwd=ROOT,
    )


def _environment() -> dict[str, str]:
    """Without settings of other servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("REALTIDE_")}


def ports(directory: Path, name: str = "server") -> dict[str, Any]:
    """What the server of that name said when it was ready."""
    file = directory / f"{name}.json"
    until(f"{name} is ready", file.exists, 180)
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def hastened(rules: str) -> str:
    """The same rules for a test's patience: windows of 30 s, and alerts after 1 s instead of minutes."""
    return re.sub(r"\[\d+m\]", "[30s]", re.sub(r"(?m)^( +for: ).+$", r"\g<1>1s", rules))


@dataclass
class Watch:
    """Prometheus and Alertmanager that watch a server."""

    prometheus: str
    alertmanager: str
    arrived: list[dict[str, Any]] = field(default_factory=list)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query. Raises AssertionError if Prometheus refuses it."""
        url = f"{self.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def notified(self, name: str, status: str) -> dict[str, Any]:
        """The alert as the webhook got it; empty if it has not."""
        for alert in self.arrived:
            if alert["labels"]["alertname"] == name and alert["status"] == status:
                return alert
        return {}


@contextlib.contextmanager
def watching(directory: Path, *targets: str) -> Iterator[Watch]:
    """Prometheus that scrapes `targets`, with the repository's rules hastened, and Alertmanager."""
    with webhook() as (hook, arrived):
        ports = [free_port() for _ in range(2)]
        watch = Watch(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", arrived)
        for name in RULES:
            (directory / name).write_text(hastened((PROMETHEUS / name).read_text()))
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [*targets]}]
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports[1]}"]}]}]}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        route = {"receiver": "hook", "group_by": ["alertname"], "group_wait": "1s", "group_interval": "1s"}
        receiver = {"name": "hook", "webhook_configs": [{"url": hook, "send_resolved": True}]}
        (directory / "alertmanager.yml").write_text(yaml.safe_dump({"route": route, "receivers": [receiver]}))
        with (
            process(
                [tool("prometheus-alertmanager"), f"--config.file={directory / 'alertmanager.yml'}",
                 f"--storage.path={directory / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{ports[1]}",
                 "--cluster.listen-address="],
                directory / "alertmanager.log",
            ),
            process(
                [tool("prometheus"), f"--config.file={directory / 'prometheus.yml'}",
                 f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{ports[0]}"],
                directory / "prometheus.log",
            ),
        ):  # fmt: skip
            for url in (watch.prometheus, watch.alertmanager):
                until(f"{url} is ready", partial(get, f"{url}/-/ready"))
            yield watch


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address that Alertmanager can send alerts to, and the alerts that have come."""
    arrived: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.extend(json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/", arrived
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
