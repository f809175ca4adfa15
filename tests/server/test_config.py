"""Where settings come from and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from realtide.server.config import ConfigError, ServerConfig, load_config


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("REALTIDE_")]:
        monkeypatch.delenv(name)


def test_flags_beat_environment_beat_file_beat_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "realtide.yaml"
    file.write_text("port: 1001\nslots: 11\nqueue_limit: 21\nmodels: [one, {bundle: two, slots: 3}]\n")
    monkeypatch.setenv("REALTIDE_PORT", "1002")
    monkeypatch.setenv("REALTIDE_SLOTS", "12")
    config = load_config(file, {"port": 1003, "host": None})
    assert (config.port, config.slots, config.queue_limit) == (1003, 12, 21)
    assert config.host == ServerConfig().host
    assert config.queue_timeout == ServerConfig().queue_timeout
    assert [(str(model.bundle), model.slots) for model in config.models] == [("one", None), ("two", 3)]


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "realtide.yaml"
    file.write_text("slots: 7\n")
    monkeypatch.setenv("REALTIDE_CONFIG", str(file))
    assert load_config().slots == 7


@pytest.mark.parametrize(
    ("value", "bundles"),
    [("a,b", ["a", "b"]), ('[{"bundle": "x", "slots": 2}, "y"]', ["x", "y"]), ("one", ["one"]), ("", [])],
)
def test_models_from_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, bundles: list[str]) -> None:
    monkeypatch.setenv("REALTIDE_MODELS", value)
    assert [str(model.bundle) for model in load_config().models] == bundles


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": 65536}, ["port", "at least 0, at most 65535", "65536", "flags"]),
        ({"slots": 0}, ["slots", "at least 1, at most 4096"]),
        ({"queue_timeout": -0.1}, ["queue_timeout", "at most 3600"]),
        ({"queue_timeout": float("nan")}, ["queue_timeout"]),
        ({"max_audio_ahead": 0.1}, ["max_audio_ahead", "at least 0.2"]),
        ({"log_level": "loud"}, ["log_level", "'debug', 'info', 'warning' or 'error'"]),
        ({"precision": "fp4"}, ["precision", "'bf16', 'int8' or 'fp8'"]),
        ({"slotz": 1}, ["slotz", "no such setting"]),
        ({"models": [{"bundle": "x", "slotz": 1}]}, ["models.0.slotz", "no such setting"]),
        ({"models": [{"slots": 1}]}, ["models.0.bundle", "required"]),
        ({"models": "[1"}, ["models", "not valid JSON"]),
        ({"tls_key": "x"}, ["tls_certificate and tls_key"]),
        ({"tls_client_ca": "x"}, ["tls_client_ca"]),
        ({"tls_key": "/nowhere", "tls_certificate": "/nowhere"}, ["no such file"]),
        ({"api_key_file": "/nowhere"}, ["api_key_file: no such file: /nowhere"]),
        ({"api_key_pepper": "a secret of length"}, ["api_key_pepper: needs api_key_file"]),
        ({"max_client_sessions": -1}, ["max_client_sessions", "at least 0, at most 1000000"]),
        ({"client_opens_per_minute": -1}, ["client_opens_per_minute", "at least 0"]),
        ({"admin_port": 65536}, ["admin_port", "at least 0, at most 65535"]),
        ({"max_connection_age": -1}, ["max_connection_age", "at least 0.0, at most 604800.0"]),
    ],
)
def test_refused(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(flags=flags)
    for word in words:
        assert word in str(error.value)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(flags={"port": -1, "slots": 0})
    assert len(str(error.value).splitlines()) == 2


def test_unknown_names_in_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "realtide.yaml"
    file.write_text("slotz: 7\n")
    with pytest.raises(ConfigError, match=r"slotz: no such setting \(file"):
        load_config(file)
    monkeypatch.setenv("REALTIDE_SLOTZ", "7")
    with pytest.raises(ConfigError, match="REALTIDE_SLOTZ: no such setting"):
        load_config()


def test_what_kubernetes_puts_into_the_environment_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "REALTIDE_PORT": "tcp://10.0.0.1:50051",
        "REALTIDE_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "REALTIDE_PORT_50051_TCP_ADDR": "10.0.0.1",
        "REALTIDE_SERVICE_HOST": "10.0.0.1",
        "REALTIDE_SERVICE_PORT": "50051",
        "REALTIDE_SERVICE_PORT_GRPC": "50051",
        "REALTIDE_METRICS_SERVICE_HOST": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_config() == ServerConfig()


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    file = tmp_path / "realtide.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["checkpoint_key", "api_key_pepper"])
def test_secrets_are_not_printed(tmp_path: Path, name: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("")
    config = load_config(flags={name: "a secret of length", "api_key_file": file})
    assert "a secret" not in str(config.printable())
    assert "a secret" not in repr(config)
    with pytest.raises(ConfigError) as error:
        load_config(flags={name: "tooshort", "api_key_file": file})
    assert "tooshort" not in str(error.value)


def test_what_the_commands_read_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "CA", "CERTIFICATE", "KEY"):
        monkeypatch.setenv(f"REALTIDE_CLIENT_{name}", "x")
    assert load_config() == ServerConfig()
    monkeypatch.setenv("REALTIDE_CLIENT_OPENS_PER_MINUTE", "7")  # which is a setting
    assert load_config().client_opens_per_minute == 7
    monkeypatch.setenv("REALTIDE_CLIENT_APIKEY", "x")
    with pytest.raises(ConfigError, match="REALTIDE_CLIENT_APIKEY: no such setting"):
        load_config()


def test_what_is_printed_can_be_loaded(tmp_path: Path) -> None:
    import yaml

    config = load_config(flags={"port": 7, "models": ["a"]})
    file = tmp_path / "printed.yaml"
    file.write_text(yaml.safe_dump(config.printable()))
    assert load_config(file) == config
