"""Commands against a server that asks for a certificate and a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from realtide.server import keyfile
from tests.cli.conftest import Process, Run, served
from tests.server import pki
from tests.server.engine import BurstEngine
from tests.server.video_engine import ClipEngine


@dataclass(frozen=True)
class Guarded:
    """The server, and what a client needs."""

    address: str
    ca: Path
    certificate: Path
    private: Path
    key: str  # for speech and models
    key_file: Path

    def flags(self) -> list[str | Path]:
        pair: list[str | Path] = ["--client-cert", self.certificate, "--client-key", self.private]
        return ["--server", self.address, "--ca", self.ca, *pair]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority, key = pki.Authority(), keyfile.Key.new()
    (folder / "server").mkdir()
    certificate, private = authority.issue().write(folder / "server")
    own = authority.issue("client").write(folder)
    (folder / "ca.pem").write_bytes(authority.roots)
    entry = {"id": key.id, "hash": key.hash(None), "services": ["speech", "models"]}
    keyfile.write(folder / "keys.yaml", [keyfile.parse_entry(entry)])
    (folder / "key.txt").write_text(key.text + "\n")
    settings = {"tls_certificate": certificate, "tls_key": private, "tls_client_ca": folder / "ca.pem"}
    for address in served([BurstEngine(), ClipEngine()], api_key_file=folder / "keys.yaml", **settings):
        local = address.replace("127.0.0.1", pki.HOST)
        yield Guarded(local, folder / "ca.pem", *own, key.text, folder / "key.txt")


def test_certificates_and_the_key_by_flags(run: Run, guarded: Guarded, recording: Path) -> None:
    done = run("transcribe", recording, *guarded.flags(), "--api-key-file", guarded.key_file, "--no-interim")
    assert (done.code, done.out.split()) == (0, ["burst1", "burst2", "burst1"]), done.err


def test_everything_by_the_environment(
    run: Run, guarded: Guarded, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "CA": guarded.ca,
        "CERTIFICATE": guarded.certificate,
        "KEY": guarded.private,
        "API_KEY": guarded.key,
    }.items():
        monkeypatch.setenv(f"REALTIDE_CLIENT_{name}", str(value))
    done = run("transcribe", recording, "--server", guarded.address, "--json", "--no-interim")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[0])["type"] == "final"


def test_what_is_for_a_server_is_not_for_the_own_one(
    run: Run,
    guarded: Guarded,
    process: Process,
    bundle: Path,
    recording: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REALTIDE_CLIENT_CA", str(guarded.ca))
    monkeypatch.setenv("REALTIDE_CLIENT_API_KEY", guarded.key)
    done = run("transcribe", recording, "--no-interim")
    assert done.code == 0, done.err


def test_refusals_are_one_sentence(run: Run, guarded: Guarded, recording: Path, tmp_path: Path) -> None:
    done = run("transcribe", recording, *guarded.flags())
    assert (done.code, done.err) == (1, "realtide: authentication failed\n")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(keyfile.Key.new().text)
    done = run("transcribe", recording, *guarded.flags(), "--api-key-file", wrong)
    assert (done.code, done.err) == (1, "realtide: authentication failed\n")
    film = ("video", "--prompt", "a fish", "--seconds", "1", "--json")
    done = run(*film, *guarded.flags(), "--api-key-file", guarded.key_file)
    assert (done.code, done.err) == (1, "realtide: not allowed with this key\n")


def test_what_cannot_work(run: Run, guarded: Guarded, recording: Path, tmp_path: Path) -> None:
    done = run("transcribe", recording, "--server", "h:1", "--client-cert", guarded.certificate)
    assert (done.code, done.err) == (2, "realtide: --client-cert and --client-key: give both or neither\n")
    for text in ("", "two words", "schlüssel"):
        file = tmp_path / "key.txt"
        file.write_text(text, encoding="utf-8")
        done = run("transcribe", recording, "--server", "h:1", "--api-key-file", file)
        assert done.code == 2
        assert "must hold one key and nothing else" in done.err
        assert not text or text not in done.err
