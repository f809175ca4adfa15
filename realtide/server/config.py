"""Configuration: one checked object from flags, environment, a YAML file and defaults, in that order.

Environment variables are the field names in capitals behind ``REALTIDE_`` (``REALTIDE_QUEUE_LIMIT=32``);
lists and mappings are JSON, and ``REALTIDE_MODELS`` may also be bundle directories with commas between them.
Names that no field has are refused wherever they stand: a typing error must not silently leave a default in
force.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from realtide.server.runtimes import RUNTIMES, Runtime

ENV_PREFIX = "REALTIDE_"
# Read by `load_config` itself: the configuration file's path.
ENV_FILE = ENV_PREFIX + "CONFIG"
# Read by the commands that are clients of a server; one environment may hold both kinds.
CLIENT_VARIABLES = frozenset(f"{ENV_PREFIX}CLIENT_{name}" for name in ("API_KEY", "CA", "CERTIFICATE", "KEY"))
# Settings that are never shown.
SECRETS = ("checkpoint_key", "api_key_pepper")
# Kubernetes puts REALTIDE_PORT=tcp://..., REALTIDE_SERVICE_HOST, REALTIDE_PORT_50051_TCP... into every pod of
# a namespace that has a Service called "realtide". They are not ours and must neither be refused nor be read.
_KUBERNETES = re.compile(
    r"REALTIDE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")


class ConfigError(Exception):
    """Not valid. The message has one line per field: name, accepted range, value and source."""


def _listed(value: object) -> object:
    """A text that is JSON, or names with commas between them, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _order(value: object) -> object:
    """An order of runtimes: a list, JSON, or names with commas between them; each once."""
    value = _listed(value)
    if isinstance(value, (list, tuple)):
        wrong = [name for name in value if name not in RUNTIMES]
        if wrong or not value or len(set(value)) < len(value):
            raise ValueError(f"must be one or more of {', '.join(RUNTIMES)}, each once")
    return value


Arithmetic = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Order = Annotated[tuple[Runtime, ...], NoDecode, BeforeValidator(_order)]


class ModelConfig(BaseModel):
    """One model to serve. What is None takes the server's value of the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path = Field(description="Directory of the model bundle.")
    slots: int | None = Field(None, ge=1, le=4096, description="Sessions that can be open at once.")
    max_batch: int | None = Field(None, ge=1, le=4096, description="Most sessions that one step advances.")
    precision: Arithmetic | None = Field(None, description="Arithmetic of the weights.")
    executors: int | None = Field(None, ge=1, le=64, description="Executors, each with an engine of its own.")
    executor_processes: bool | None = Field(
        None, description="Whether its executors are processes of their own."
    )
    resident: int | None = Field(
        None, ge=1, le=4096, description="Video sessions whose caches are in memory; further ones are parked."
    )
    cache_bytes: int | None = Field(
        None, ge=1 << 16, le=1 << 44, description="Budget of the condition cache of an image model."
    )
    runtimes: Order | None = Field(None, description="Runtimes in the order in which they are tried.")


class ServerConfig(BaseModel):
    """Every setting of the server. Times are in seconds and sizes in bytes unless a name says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Where
    host: str = Field("0.0.0.0", min_length=1, description="Address that gRPC listens on.")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0: any free one.")
    metrics_host: str = Field("0.0.0.0", min_length=1, description="Address of the Prometheus endpoint.")
    metrics_port: int = Field(9090, ge=0, le=65535, description="Prometheus port; 0: any free one.")
    metrics_enabled: bool = Field(True, description="Whether to serve Prometheus metrics.")
    port_file: Path | None = Field(
        None, description="File to write the ports to (JSON) once the server is ready."
    )
    admin_host: str = Field("0.0.0.0", min_length=1, description="Address of the admin port.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port for health and reflection, plain text, without keys; 0: any free one; None: none.",
    )

    # Who
    tls_certificate: Path | None = Field(
        None, description="PEM chain of the server; with tls_key turns TLS on. Read again when it changes."
    )
    tls_key: Path | None = Field(None, description="PEM private key of the server, without a passphrase.")
    tls_client_ca: Path | None = Field(
        None, description="PEM roots; if given, clients must show a certificate of theirs."
    )
    api_key_file: Path | None = Field(
        None, description="YAML file of hashed API keys; read again when it changes. None: no key is needed."
    )
    api_key_pepper: str | None = Field(
        None, min_length=16, repr=False, description="Secret that goes into the hashes of API keys."
    )
    max_client_sessions: int = Field(
        0, ge=0, le=1_000_000, description="Sessions of one client at once, unless its key says; 0: no limit."
    )
    client_opens_per_minute: float = Field(
        0.0, ge=0.0, le=1e6, description="Sessions that a client may begin a minute, likewise; 0: no limit."
    )

    # What
    models: Annotated[tuple[ModelConfig, ...], NoDecode] = Field((), description="Models to serve.")
    slots: int = Field(64, ge=1, le=4096, description="Sessions that can be open at once, per model.")
    video_slots: int = Field(
        4, ge=1, le=4096, description="The same, of models for video: each holds a cache of its own."
    )
    video_resident: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Video sessions of a model whose caches are in memory; if more are open, idle ones are "
        "parked. None: all.",
    )
    image_cache_bytes: int | None = Field(
        None,
        ge=1 << 16,
        le=1 << 44,
        description="Budget of the condition cache of an image model; None: 256 MiB, or the conditions of "
        "one image if they are more.",
    )
    max_batch: int | None = Field(
        None, ge=1, le=4096, description="Most sessions a step advances; None: all slots."
    )
    precision: Arithmetic = Field("fp32", description="Arithmetic of the weights.")
    runtimes: Order = Field(
        ("onnxruntime",),
        description="Runtimes in the order in which they are tried: tensorrt, torch-cuda, onnxruntime, "
        "torch-cpu. Why one was not taken is logged.",
    )
    plan_directory: Path | None = Field(
        None, description="TensorRT's plan cache; None: where `realtide models build` puts plans."
    )
    build_plans: bool = Field(
        False,
        description="Build plans that the cache lacks while a bundle is loaded, which takes minutes; false: "
        "TensorRT does not serve such a bundle.",
    )
    torch_compile: bool = Field(
        False,
        description="Have PyTorch compile what it runs most (torch.compile), which takes minutes while a "
        "bundle is loaded; on a processor a C++ compiler is needed.",
    )
    executors: int = Field(1, ge=1, le=64, description="Executors per model, each with an engine of its own.")
    executor_processes: bool | None = Field(
        None,
        description="Whether executors of speech models on a processor are processes of their own and not "
        "threads; None: where the server may use two processors or more.",
    )
    ort_threads: int = Field(1, ge=1, le=64, description="Threads inside one ONNX Runtime step.")

    # Admission
    queue_limit: int = Field(64, ge=0, le=65536, description="Sessions that may wait for a slot, per model.")
    queue_timeout: float = Field(10.0, ge=0.0, le=3600.0, description="Longest wait for a slot.")
    max_streams: int = Field(
        4096, ge=1, le=1_000_000, description="Calls open at once, waiting and half-open ones too."
    )
    full_is_unhealthy: bool = Field(
        False, description="Report the whole server NOT_SERVING when every model is full."
    )

    # Limits of a session
    idle_timeout: float = Field(
        60.0, ge=0.0, le=86400.0, description="Longest silence of a client; 0: no limit."
    )
    max_session_seconds: float = Field(0.0, ge=0.0, le=604800.0, description="Longest session; 0: no limit.")
    max_message_bytes: int = Field(1 << 20, ge=1024, le=1 << 26, description="Largest message from a client.")
    max_audio_ahead: float = Field(
        5.0, ge=0.2, le=600.0, description="Seconds of audio taken in ahead of processing."
    )
    max_pending_events: int = Field(64, ge=4, le=4096, description="Results a client may leave unread.")
    max_pending_frame_bytes: int = Field(
        1 << 25,
        ge=1 << 20,
        le=1 << 32,
        description="Raw size of frames a client may leave unread, where it is less than the results.",
    )
    max_pending_controls: int = Field(
        64, ge=1, le=256, description="Controls that may await their second receipt."
    )
    max_control_id_bytes: int = Field(128, ge=8, le=4096, description="Longest control_id and request_id.")
    max_checkpoint_bytes: int = Field(1 << 23, ge=4096, le=1 << 28, description="Largest checkpoint.")
    min_checkpoint_interval_ms: int = Field(
        1000, ge=10, le=3_600_000, description="Shortest interval of checkpoints."
    )
    max_phrases: int = Field(1000, ge=0, le=100_000, description="Most boosted phrases of a session.")
    max_phrase_characters: int = Field(100, ge=1, le=10_000, description="Longest boosted phrase.")
    max_prompt_characters: int = Field(
        2000, ge=1, le=100_000, description="Longest prompt of a video or image."
    )
    max_upload_pixels: int = Field(
        1 << 24, ge=1, le=1 << 30, description="Most pixels of an uploaded condition image."
    )
    max_session_conditions: int = Field(
        16, ge=0, le=4096, description="Conditions that an image session may have uploaded at once."
    )
    max_video_credit: float = Field(
        20.0, ge=1.0, le=3600.0, description="Seconds of video that a credit may be ahead of what was sent."
    )
    max_video_frames: int = Field(
        10_000_000, ge=1, le=1 << 53, description="Longest video, in frames; endless ones have no limit."
    )
    checkpoint_key: str | None = Field(
        None,
        min_length=16,
        repr=False,
        description="Secret shared by all replicas: signs checkpoints with HMAC-SHA256.",
    )

    # Time
    step_latency: float = Field(
        0.1, gt=0.0, le=60.0, description="Deadline of a step after its input arrived."
    )
    drain_seconds: float = Field(20.0, ge=0.0, le=86400.0, description="Time from going_away to UNAVAILABLE.")
    grace_seconds: float = Field(2.0, ge=0.0, le=600.0, description="Time for calls to end after the drain.")
    keepalive_seconds: float = Field(
        30.0, ge=1.0, le=7200.0, description="Interval of pings to silent connections."
    )
    keepalive_timeout: float = Field(10.0, ge=0.1, le=600.0, description="Wait for a ping's answer.")
    max_connection_age: float = Field(
        0.0,
        ge=0.0,
        le=604800.0,
        description="Age, give or take a tenth, at which connections and sessions are sent away so that load "
        "spreads again; 0: never.",
    )
    max_connection_grace: float = Field(
        30.0, ge=0.0, le=86400.0, description="Time from then to UNAVAILABLE for a session."
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level logged."
    )
    log_format: Literal["console", "json"] = Field("console", description="How log lines are written.")

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: object) -> object:
        """Accept bundle directories as plain strings, also one string with commas, and JSON."""
        value = _listed(value)
        if isinstance(value, (list, tuple)):
            return [{"bundle": item} if isinstance(item, (str, Path)) else item for item in value]
        return value

    @model_validator(mode="after")
    def _together(self) -> ServerConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: needs tls_certificate and tls_key")
        if self.api_key_pepper is not None and self.api_key_file is None:
            raise ValueError("api_key_pepper: needs api_key_file")
        for field in ("tls_certificate", "tls_key", "tls_client_ca", "api_key_file"):
            path = getattr(self, field)
            if path is not None and not path.is_file():
                raise ValueError(f"{field}: no such file: {path}")
        return self

    def printable(self) -> dict[str, Any]:
        """The settings in force as plain JSON types, secrets replaced (for ``serve --print-config``)."""
        data = self.model_dump(mode="json")
        return data | {name: "***" for name in SECRETS if data[name] is not None}


class _Environment(ServerConfig, BaseSettings):
    """Reads the environment with the fields' own types; only `EnvSettingsSource` uses it."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)


def load_config(file: Path | str | None = None, flags: Mapping[str, Any] | None = None) -> ServerConfig:
    """Merge and check all sources: flags beat environment beats file beats defaults.

    Args:
        file: YAML file; None takes the one that ``REALTIDE_CONFIG`` names, if any.
        flags: values by field name; None values count as not given.

    Raises:
        ConfigError: a value is out of its range, a name is unknown, or the file cannot be read.
    """
    file = file or os.environ.get(ENV_FILE) or None
    layers = (
        (f"file {file}", _read_file(Path(file)) if file else {}),
        ("environment", _read_environment()),
        ("flags", {name: value for name, value in (flags or {}).items() if value is not None}),
    )
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in layers:
        merged.update(values)
        origin.update(dict.fromkeys(values, source))
    try:
        return ServerConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"configuration file {path} must hold a mapping of settings, not {type(data).__name__}"
        )
    return {str(name): value for name, value in data.items()}


def _read_environment() -> dict[str, Any]:
    known = {ENV_PREFIX + name.upper(): name for name in ServerConfig.model_fields}
    unknown = [
        name
        for name in os.environ
        if name.startswith(ENV_PREFIX)
        and name not in known
        and name != ENV_FILE
        and name not in CLIENT_VARIABLES
        and not _KUBERNETES.fullmatch(name)
    ]
    if unknown:
        raise ConfigError("\n".join(f"{name}: no such setting (environment)" for name in sorted(unknown)))
    try:
        values: dict[str, Any] = EnvSettingsSource(_Environment)()
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from None
    if _KUBERNETES_PORT.match(str(values.get("port", ""))):
        del values["port"]
    return values


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        source = origin.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: no such setting ({source})")
        elif not path:
            lines.append(message)
        else:
            given = "" if path in SECRETS else f", got {problem['input']!r}"
            lines.append(f"{path}: {message}{_range(path)}{given} ({source})")
    return "\n".join(lines)


def _range(path: str) -> str:
    """The field's whole range, because pydantic names only the end that was overstepped."""
    field = ServerConfig.model_fields.get(path)
    if field is None:
        return ""
    low = next(
        (f"{word} {value}" for word, value in _bounds(field, "ge", "at least", "gt", "more than")), None
    )
    high = next(
        (f"{word} {value}" for word, value in _bounds(field, "le", "at most", "lt", "less than")), None
    )
    return f" (accepted: {', '.join(part for part in (low, high) if part)})" if low or high else ""


def _bounds(field: FieldInfo, *names: str) -> list[tuple[str, Any]]:
    found = []
    for attribute, word in zip(names[::2], names[1::2], strict=True):
        found += [
            (word, value) for item in field.metadata if (value := getattr(item, attribute, None)) is not None
        ]
    return found
