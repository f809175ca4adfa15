"""`python -m realtide.server.probe`, against a real server."""

from __future__ import annotations

import asyncio

import pytest

from realtide.server import probe
from tests.server.helpers import running


async def ask(*arguments: str) -> int:
    return await asyncio.to_thread(probe.main, arguments)


async def test_it_says_what_health_says(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(drain_seconds=5.0) as server:
        address = f"127.0.0.1:{server.server.port}"
        assert await ask("--address", address) == 0
        assert await ask("--address", address, "--service", "realtide.v1.Speech") == 0
        assert capsys.readouterr().err == ""
        assert await ask("--address", address, "--service", "nothing") == 1
        assert "NOT_FOUND" in capsys.readouterr().err


async def test_nobody_there_is_not_well(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as server:
        port = server.server.port
    assert await ask("--address", f"127.0.0.1:{port}", "--timeout", "0.2") == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err


async def test_the_address_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as server:
        monkeypatch.setenv("REALTIDE_PORT", str(server.server.port))
        assert await ask() == 0


async def test_wrong_settings_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REALTIDE_PROT", "1")
    assert await ask() == 1
    assert capsys.readouterr().err == "REALTIDE_PROT: no such setting (environment)\n"
