"""How the commands that are clients reach a server that is not their own: TLS, certificates, keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from realtide.cli.errors import UsageError

_SERVER = "Server"
# Not an option: command lines are seen by every user of a machine and stay in histories.
KEY_VARIABLE = "REALTIDE_CLIENT_API_KEY"

Server = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Use this server.", rich_help_panel=_SERVER)
]
Tls = Annotated[bool, typer.Option("--tls", help="Connect with TLS.", rich_help_panel=_SERVER)]
Ca = Annotated[
    Path | None,
    typer.Option(
        help="PEM roots to trust (implies --tls).",
        envvar="REALTIDE_CLIENT_CA",
        exists=True,
        dir_okay=False,
        rich_help_panel=_SERVER,
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        "--client-cert",
        help="PEM chain to show to the server (implies --tls).",
        envvar="REALTIDE_CLIENT_CERTIFICATE",
        exists=True,
        dir_okay=False,
        rich_help_panel=_SERVER,
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        "--client-key",
        help="PEM private key of --client-cert.",
        envvar="REALTIDE_CLIENT_KEY",
        exists=True,
        dir_okay=False,
        rich_help_panel=_SERVER,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help=f"File that holds the API key; else {KEY_VARIABLE} is the key.",
        exists=True,
        dir_okay=False,
        rich_help_panel=_SERVER,
    ),
]


def credentials(
    tls: bool, ca: Path | None, certificate: Path | None, key: Path | None, api_key_file: Path | None
) -> dict[str, Any]:
    """Keyword arguments of `realtide_client.connect` from the options and the environment.

    Raises:
        UsageError: A certificate without its key or the other way round, or a file without an API key.
    """
    if (certificate is None) != (key is None):
        raise UsageError("--client-cert and --client-key: give both or neither")
    api_key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if api_key_file is not None:
        api_key = api_key_file.read_text(encoding="utf-8", errors="replace").strip()
        if not api_key or len(api_key.split()) > 1 or not api_key.isascii():
            raise UsageError(f"--api-key-file {api_key_file}: must hold one key and nothing else")
    return {
        "tls": tls,
        "root_certificates": None if ca is None else ca.read_bytes(),
        "client_certificate": None if certificate is None else certificate.read_bytes(),
        "client_key": None if key is None else key.read_bytes(),
        "api_key": api_key,
    }
