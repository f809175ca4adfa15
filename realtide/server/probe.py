"""Ask a server whether it serves: ``python -m realtide.server.probe``, for containers and scripts.

Kubernetes asks grpc.health.v1 itself; this is for what has no gRPC probes (HEALTHCHECK of an image, compose,
`helm test`). It exits with 0 if the server says SERVING, and otherwise with 1 and one line that says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, service: str = "", timeout: float = 4.0, roots: bytes | None = None) -> str:
    """The state of `service` ("": the server as a whole) at HOST:PORT.

    Args:
        address: where to ask.
        service: full name of a gRPC service.
        timeout: seconds for connecting and the answer together.
        roots: PEM roots; if given the connection uses TLS.

    Returns:
        ``SERVING``, ``NOT_SERVING``, or what went wrong, starting with the status code's name.
    """
    credentials = grpc.ssl_channel_credentials(roots) if roots is not None else None
    with (
        grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    ) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def own_address() -> str:
    """Where the server of this container can be asked, by the settings in force: without TLS if it can be.

    Raises:
        ValueError: the settings are not valid.
    """
    # Only here: with an address given, an old cluster's probe that runs every few seconds starts light.
    from realtide.server.config import ConfigError, load_config

    try:
        config = load_config()
    except ConfigError as error:
        raise ValueError(str(error)) from None
    port = config.admin_port or config.port
    return f"127.0.0.1:{port}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m realtide.server.probe", description=__doc__)
    parser.add_argument("--address", help="HOST:PORT; default: by the settings in force, on this machine")
    parser.add_argument(
        "--service", default="", help="full name of a service; default: the server as a whole"
    )
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds")
    parser.add_argument("--ca", type=Path, help="PEM roots: use TLS")
    given = parser.parse_args(arguments)
    try:
        address = given.address or own_address()
        roots = given.ca.read_bytes() if given.ca else None
    except (ValueError, OSError) as error:
        sys.stderr.write("; ".join(str(error).splitlines()) + "\n")
        return 1
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    state = probe(address, given.service, given.timeout, roots)
    if state != "SERVING":
        sys.stderr.write(f"{address}: {state}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
