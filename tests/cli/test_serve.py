"""`realtide serve` and what is common to all commands."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

import realtide as package
from realtide.cli.own_server import wait_healthy
from tests.cli.conftest import Process, Run
from tests.server import pki


def test_settings_in_force_are_printed_and_flags_win(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.yaml").write_text("port: 1234\nslots: 7\nqueue_limit: 3\n")
    monkeypatch.setenv("REALTIDE_SLOTS", "9")
    done = run(
        "serve", "--config", "server.yaml", "--port", "4321", "--set", "idle-timeout=12.5", "--print-config"
    )
    assert done.err == ""
    settings = yaml.safe_load(done.out)
    chosen = {name: settings[name] for name in ("port", "slots", "queue_limit", "idle_timeout")}
    assert chosen == {"port": 4321, "slots": 9, "queue_limit": 3, "idle_timeout": 12.5}


def test_bundles_are_found_by_name_by_path_and_by_themselves(run: Run, bundle: Path) -> None:
    for arguments in ([], ["bursts"], [bundle], ["models/bursts"]):
        done = run("serve", *arguments, "--print-config")
        served = [Path(one["bundle"]) for one in yaml.safe_load(done.out)["models"]]
        assert [path.resolve() for path in served] == [bundle.resolve()]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--port", "70000"], 2, "port: Input should be less than or equal to 65535"),
        (["--set", "slots"], 2, "not of the form NAME=VALUE"),
        (["--set", "no_such=1"], 2, "no_such: no such setting"),
        (["--set", "slots=[1"], 2, "not a YAML value"),
        (["--config", "none.yaml"], 2, "none.yaml cannot be read"),
        (["nothing"], 1, "there is no bundle 'nothing'"),
    ],
)
def test_bad_settings_are_refused(run: Run, arguments: list[str], code: int, sentence: str) -> None:
    done = run("serve", *arguments)
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_strangers_do_not_write_into_the_log(process: Process, bundle: Path, tmp_path: Path) -> None:
    certificate, key = pki.Authority().issue().write(tmp_path)
    tls = ("--set", f"tls_certificate={certificate}", "--set", f"tls_key={key}")
    ports = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--log-format", "json")
    with subprocess.Popen(
        process.line("serve", bundle, *ports, *tls),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=process.directory,
        env=process.environment,
    ) as server:
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["port"]
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    assert connection.recv(100) == b""
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    said = [json.loads(line)["message"] for line in errors.decode().splitlines()]
    assert said[-2:] == ["draining", "stopped"]
    assert all("andshake" not in line for line in said)


def test_it_serves_until_it_is_told_to_stop(process: Process, bundle: Path) -> None:
    ports = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    with subprocess.Popen(
        process.line("serve", bundle, *ports, "--log-level", "warning"),
        stdout=subprocess.PIPE,
        cwd=process.directory,
        env=process.environment,
    ) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            assert ready["models"] == ["bursts"]
            asyncio.run(wait_healthy(f"127.0.0.1:{ready['port']}"))
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()  # a failure above must not leave the test waiting for a server that nobody stops


@pytest.mark.parametrize("command", ["serve", "transcribe", "demo", "models list", "models verify"])
def test_every_command_teaches_with_an_example(run: Run, command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.code == 0
    assert f"Example: realtide {command}" in done.out


def test_the_version_and_the_commands(run: Run) -> None:
    assert run("--version").out.strip() == f"realtide {package.__version__}"
    assert run("no-such-command").code == 2
    assert run("serve", "--no-such-option").code == 2
