"""`realtide serve`: run the server in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from realtide.cli import models
from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.server.config import ServerConfig

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of --print-config. Repeatable."),
]


def command(
    bundle: Annotated[
        list[str] | None,
        typer.Argument(help="Model bundles (directories, or names in ./models). Default: all in ./models."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of settings.", dir_okay=False)
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="gRPC port; 0: any free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus port; 0: any free one.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sessions that can be open at once, per model.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or int8; on GPUs fp16, bf16 or fp8 as well.")
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(help="Runtimes in the order tried, with commas: torch-cuda,onnxruntime,torch-cpu."),
    ] = None,
    executors: Annotated[int | None, typer.Option(help="Executors per model.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.")] = None,
    settings: Setting = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings in force as YAML, and stop.")
    ] = False,
) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C; a second one does not wait for sessions.

    Settings come from flags, else REALTIDE_* variables, else the file, else defaults. One JSON line on
    standard output says when the server is ready and on which ports.

    Example: realtide serve models/ancat-commands-en --port 50051 --set queue_limit=16
    """
    from realtide.server.config import ConfigError, load_config

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "slots": slots,
        "precision": precision,
        "runtimes": runtimes,
        "executors": executors,
        "log_level": log_level,
        "log_format": log_format,
        **assignments(settings or []),
    }
    if bundle:
        flags["models"] = [str(models.resolve(name)) for name in bundle]
    try:
        loaded = _with_bundles(load_config(config, flags))
    except ConfigError as error:
        raise UsageError("; ".join(str(error).splitlines())) from None
    if print_config:
        typer.echo(yaml.safe_dump(loaded.printable(), sort_keys=False), nl=False)
        return
    from realtide.server.app import run

    try:
        run(loaded)
    except (ConfigError, ImportError, OSError, ValueError) as error:
        raise CommandError("; ".join(str(error).splitlines())) from error


def _with_bundles(config: ServerConfig) -> ServerConfig:
    """Bundles that were left to be found: those of a directory of bundles, or all if none were named."""
    from realtide import bundle
    from realtide.server.config import ConfigError, ModelConfig

    try:
        if not config.models:
            served = [
                ModelConfig.model_validate({"bundle": directory})
                for directory in bundle.find_bundles().values()
            ]
        else:
            served = [
                model.model_copy(update={"bundle": directory})
                for model in config.models
                for directory in (bundle.find_bundles([model.bundle]) or {"": model.bundle}).values()
            ]
    except bundle.BundleError as error:
        raise ConfigError(str(error)) from None
    return config.model_copy(update={"models": tuple(served)})


def assignments(pairs: list[str]) -> dict[str, Any]:
    """Parse NAME=VALUE; values are YAML, so numbers, booleans and lists are what they look like.

    Raises:
        UsageError: One has no `=` or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair!r} is not of the form NAME=VALUE")
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {name}: {text!r} is not a YAML value") from None
    return values
