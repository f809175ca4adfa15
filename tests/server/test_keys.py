"""API keys, their file, and the tool that makes, lists and revokes them."""

from __future__ import annotations

import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from realtide.server import keyfile, keys
from realtide.server.config import ConfigError

PEPPER = "not in the file 1234"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def run(*arguments: str | Path, fails: bool = False) -> str:
    result = CliRunner().invoke(keys.app, [str(one) for one in arguments], catch_exceptions=False)
    assert (result.exit_code != 0) == fails, result.output
    return result.output


@pytest.fixture(autouse=True)
def _no_pepper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALTIDE_API_KEY_PEPPER", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "keys.yaml"


def test_a_new_key_is_found_by_its_hash_only(file: Path) -> None:
    text = run("new", file, "--note", "kitchen", "--services", "speech, models", "--sessions", "3").strip()
    assert re.fullmatch(r"rt_[a-z2-7]{8}_[A-Za-z0-9_-]{43}", text)
    key = keyfile.Key.parse(text)
    assert key is not None
    assert key.secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    known = keyfile.read(file, None)
    entry = known.find(text)
    assert entry is not None
    assert (entry.id, entry.note, entry.services, entry.sessions) == (
        key.id,
        "kitchen",
        ("speech", "models"),
        3,
    )
    assert (entry.opens_per_minute, entry.expires) == (None, None)
    assert known.holds(entry, NOW)
    changed = "A" if key.secret[0] != "A" else "B"
    for wrong in (
        f"rt_{key.id}_{changed}{key.secret[1:]}",
        f"rt_aaaaaaaa_{key.secret}",
        text[:-1],
        text + "A",
        key.secret,
        "",
    ):
        assert known.find(wrong) is None, wrong


def test_hashes_with_a_pepper(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("new", file).strip()
    monkeypatch.setenv("REALTIDE_API_KEY_PEPPER", PEPPER)
    keyed = run("new", file).strip()
    known = keyfile.read(file, PEPPER)
    assert known.find(plain) is not None  # made before there was a pepper
    assert known.find(keyed) is not None
    assert keyfile.read(file, PEPPER[::-1]).find(keyed) is None
    with pytest.raises(ConfigError, match="was made with a pepper, api_key_pepper is not set"):
        keyfile.read(file, None)


def test_expiry_is_a_time(file: Path) -> None:
    text = run("new", file, "--days", "1.5").strip()
    entry = keyfile.read(file, None).find(text)
    assert entry is not None
    assert entry.expires is not None
    left = entry.expires - datetime.now(UTC)
    assert timedelta(days=1.4) < left <= timedelta(days=1.5)
    assert not entry.expired(entry.expires - timedelta(seconds=1))
    assert entry.expired(entry.expires)
    # As people write it.
    data = yaml.safe_load(file.read_text())
    data["keys"][0]["expires"] = NOW
    file.write_text(yaml.safe_dump(data))
    entry = keyfile.read(file, None).find(text)
    assert entry is not None
    assert entry.expires == NOW


def test_list_and_revoke(file: Path) -> None:
    first = keyfile.Key.parse(run("new", file, "--note", "first").strip())
    second = keyfile.Key.parse(run("new", file, "--days", "0", "--opens-per-minute", "0").strip())
    assert first is not None
    assert second is not None
    file.chmod(0o640)
    listed = run("list", file).splitlines()
    assert listed[0].startswith(f"{first.id}  never expires  speech,video,image,models  ")
    assert listed[0].endswith("sessions as the server, a minute as the server  first")
    assert listed[1].startswith(f"{second.id}  expired")
    assert listed[1].endswith("sessions as the server, a minute unlimited")
    assert all(key.secret not in run("list", file) for key in (first, second))
    known = keyfile.read(file, None)
    entry = known.find(first.text)
    assert entry is not None
    run("revoke", file, first.id)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640  # as it was found
    assert keyfile.read(file, None).find(first.text) is None
    assert not keyfile.read(file, None).holds(entry, NOW)
    run("revoke", file, second.text)
    assert run("list", file) == ""
    with pytest.raises(ConfigError, match=f"has no key with the id {second.id}$"):
        run("revoke", file, second.text)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[", "is not valid YAML"),
        ("- 1", "valid dictionary"),
        ("clients: []", "clients: no such field"),
        ("keys: [{id: aaaaaaaa}]", r"keys\.0\.hash: Field required"),
        ("keys: [{id: AAAA, hash: 'sha256:%s'}]", r"keys\.0\.id: String should match"),
        ("keys: [{id: aaaaaaaa, hash: 'md5:%s'}]", r"keys\.0\.hash: String should match"),
        ("keys: [{id: aaaaaaaa, hash: 'sha256:%s', services: []}]", "at least one service"),
        ("keys: [{id: aaaaaaaa, hash: 'sha256:%s', services: [fax]}]", "'speech', 'video', 'image'"),
        ("keys: [{id: aaaaaaaa, hash: 'sha256:%s', sessions: -1}]", r"keys\.0\.sessions: .*equal to 0"),
        ("keys: [{id: aaaaaaaa, hash: 'sha256:%s', expires: 2026-01-01}]", r"keys\.0\.expires"),
        ("keys: [{id: aaaaaaaa, hash: 'sha256:%s'}, {id: aaaaaaaa, hash: 'sha256:%s'}]", "more than one key"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_its_hashes(
    tmp_path: Path, content: str, problem: str
) -> None:
    digest = "0123456789abcdef" * 4
    file = tmp_path / "keys.yaml"
    file.write_text(content.replace("%s", digest))
    with pytest.raises(ConfigError, match=problem) as caught:
        keyfile.read(file, None)
    assert digest not in str(caught.value)
    assert str(caught.value).startswith(f"api_key_file: {file}")


def test_a_missing_and_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        keyfile.read(file, None)
    file.write_text("")
    assert keyfile.read(file, None).entries == {}


def test_the_tool_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["keys", "list", str(tmp_path / "none.yaml")])
        with pytest.raises(SystemExit) as ended:
            keys.main()
    assert ended.value.code == 1
    assert "realtide: api_key_file:" in capsys.readouterr().err
