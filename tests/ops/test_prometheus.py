"""Rules, alerts and dashboards with real Prometheus and Alertmanager, and a real server under load."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import realtide_client as rt
from tests.ops.load import Load
from tests.ops.stack import (
    PROMETHEUS,
    ROOT,
    RULES,
    Watch,
    free_port,
    get,
    image_server,
    ports,
    server,
    until,
    watching,
)
from tools.ops_tools import tool

pytestmark = pytest.mark.ops

BOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
SLOTS = 3  # of each model


def promtool(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("promtool"), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=PROMETHEUS / "tests",
    )


def expressions(board: Path) -> list[tuple[str, str]]:
    """Title and query of every panel, as Grafana would send them with everything chosen."""
    found = []
    for panel in json.loads(board.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = re.sub(r"\$(job|instance|model)\b", ".*", target["expr"])
            found.append((panel["title"], query.replace("$__rate_interval", "15s")))
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """One port for all servers of this module, as a target is one address."""
    return free_port()


@pytest.fixture(scope="module")
def images(directory: Path) -> Iterator[dict[str, Any]]:
    """Ports of a server of images that runs all the time."""
    with image_server(directory, 0):
        yield ports(directory, "images")


@pytest.fixture(scope="module")
def watch(directory: Path, metrics_port: int, images: dict[str, Any]) -> Iterator[Watch]:
    with watching(
        directory, *(f"127.0.0.1:{port}" for port in (metrics_port, images["metrics_port"]))
    ) as watch:
        yield watch


@pytest.fixture
def address(directory: Path, metrics_port: int, watch: Watch) -> Iterator[str]:
    """A server that Prometheus has scraped."""
    with server(
        directory,
        "port=0",
        f"metrics_port={metrics_port}",
        f"slots={SLOTS}",
        f"video_slots={SLOTS}",
        "queue_limit=1",
        "drain_seconds=0",
    ):
        port = ports(directory)["port"]
        mine = f'realtide_build_info{{instance="127.0.0.1:{metrics_port}"}}'
        until("Prometheus scrapes the server", lambda: watch.query(mine))
        yield f"127.0.0.1:{port}"


def test_promtool_finds_nothing_in_the_rules() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", *[PROMETHEUS / name for name in RULES])
    assert done.returncode == 0, done.stderr
    done = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_in_its_unit_test() -> None:
    done = promtool("test", "rules", "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_unit_test_can_fail(tmp_path: Path) -> None:
    """The same tests with a rule that never fires."""
    for name in RULES:
        text = (PROMETHEUS / name).read_text()
        (tmp_path / name).write_text(text.replace("realtide:sessions_queued:sum > 0", "vector(0) > 1"))
    (tmp_path / "tests").mkdir()
    test = tmp_path / "tests" / "alerts_test.yaml"
    test.write_text((PROMETHEUS / "tests" / "alerts_test.yaml").read_text())
    done = promtool("test", "rules", test)
    assert done.returncode != 0
    assert "RealtideSessionsWait" in done.stdout + done.stderr


def test_the_exposition_follows_the_rules_of_prometheus(address: str, metrics_port: int) -> None:
    with Load(address) as load:
        until("sessions have ended", lambda: load.check() >= 2)
    text = get(f"http://127.0.0.1:{metrics_port}/metrics")
    assert "realtide_final_delay_seconds_bucket" in text
    done = promtool("check", "metrics", stdin=text)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_query_of_every_dashboard_returns_data_under_load(
    address: str, images: dict[str, Any], watch: Watch
) -> None:
    missing = {(board.stem, *query) for board in BOARDS for query in expressions(board)}
    assert len(missing) > 60

    def all_answered(load: Load) -> bool:
        load.check()
        for one in sorted(missing):
            series = watch.query(one[2])
            if any(math.isfinite(float(entry["value"][1])) for entry in series):
                missing.discard(one)
        return not missing

    with Load(address, f"127.0.0.1:{images['port']}") as load:
        try:
            until("data", lambda: all_answered(load), 150)
        except AssertionError:
            without = "; ".join(f"{board}, {title}: {query}" for board, title, query in sorted(missing))
            pytest.fail(f"without data: {without}")


def test_full_slots_reach_alertmanager_and_the_alert_ends_when_they_are_free(
    address: str, watch: Watch
) -> None:
    watch.arrived.clear()

    async def hold() -> None:
        """Take every slot of the speech model, and a place in its queue."""
        client = rt.connect(address)
        held = [client.speech(sample_rate=16000, checkpoint_interval_ms=0) for _ in range(SLOTS)]
        for stream in held:
            await stream.open()
        waiting = client.speech(sample_rate=16000)
        opening = asyncio.create_task(waiting.open())
        for name in ("RealtideSlotsFull", "RealtideSessionsWait"):
            await asyncio.to_thread(until, name, partial(watch.notified, name, "firing"))
        for stream in held:
            await stream.close()
        await opening
        await waiting.close()
        await client.close()

    asyncio.run(hold())
    alert = watch.notified("RealtideSlotsFull", "firing")
    assert alert["labels"]["model"] == "ancat-commands-en"
    assert alert["annotations"]["summary"] == "ancat-commands-en: 100% of the slots are taken"
    assert alert["annotations"]["runbook"] == "docs/operations.md#realtideslotsfull"
    until("the alert ends", lambda: watch.notified("RealtideSlotsFull", "resolved"))
    active = get(f"{watch.alertmanager}/api/v2/alerts")
    assert "RealtideSlotsLeaked" not in str(active)


def test_a_server_that_is_gone_reaches_alertmanager(watch: Watch, metrics_port: int) -> None:
    """The servers of the tests before are gone."""
    alert = until("RealtideDown", lambda: watch.notified("RealtideDown", "firing"))
    assert alert["labels"]["instance"] == f"127.0.0.1:{metrics_port}"
    assert alert["labels"]["severity"] == "critical"
