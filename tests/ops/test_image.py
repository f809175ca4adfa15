"""The image: built from the Dockerfile, run without root on a read-only file system, it transcribes.

Registries cannot be reached from everywhere, so the base is made by debootstrap of the same Debian release
and given as build argument; everything else is the Dockerfile as it stands. The target `gpu` is not built
here: its packages take several gigabytes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import realtide_client as rt
from realtide_client import sync
from tests.ops.load import RECORDING
from tests.ops.stack import ROOT, free_port, until
from tools.ops_tools import PATH, tool

pytestmark = pytest.mark.ops

BASE = "localhost/realtide-ops-python:bookworm"
IMAGE = "localhost/realtide-ops:cpu"
NAME = "realtide-ops-test"
PODMAN = ("--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc")
UID = "10001"


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": PATH}
    )
    assert not check or done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def podman(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(tool("podman"), *PODMAN, *arguments, check=check)


def pip_configuration() -> list[str]:
    """Options that show the builder this machine's configuration of pip, and the folders that it names."""
    paths = set()
    debug = run(sys.executable, "-m", "pip", "config", "debug").stdout
    for line in debug.splitlines():
        name, _, rest = line.strip().partition(",")
        if rest.strip() == "exists: True":
            paths.add(name)
    for line in run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines():
        for word in line.partition("=")[2].strip("'").split():
            # An index in a folder links to files beside it.
            path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
            if path.is_absolute() and path.exists():
                paths.add(str(path))
    return [word for path in sorted(paths) for word in ("--volume", f"{path}:{path}:ro")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with Python; kept between runs, because it takes minutes."""
    if podman("image", "exists", BASE, check=False).returncode:
        root = tmp_path_factory.mktemp("base") / "root"
        run(
            tool("debootstrap"),
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            "bookworm",
            root,
        )
        archive = root.with_suffix(".tar")
        run(
            "tar",
            "--directory",
            root,
            "--create",
            "--file",
            archive,
            "--exclude=./var/cache/apt/archives/*.deb",
            ".",
        )
        podman("import", archive, BASE)
        archive.unlink()
    return BASE


@pytest.fixture(scope="module")
def image(base: str) -> dict[str, Any]:
    """The image, as `podman inspect` tells of it."""
    run(
        tool("buildah"), "bud", "--isolation", "chroot", "--network", "host", "--layers",
        "--format", "docker", "--target", "cpu", "--build-arg", f"PYTHON_BASE={base}",
        *pip_configuration(), "--tag", IMAGE, ROOT,
    )  # fmt: skip
    (found,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    loaded: dict[str, Any] = found
    return loaded


@pytest.fixture(scope="module")
def container(image: dict[str, Any]) -> Iterator[str]:
    """A running container with nothing but what the documentation gives it; the server's address."""
    podman("rm", "--force", NAME, check=False)
    port, limits = free_port(), []
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(number)[1]
        most = 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)
        limits += ["--ulimit", f"{name}={most}:{most}"]
    settings = {"HOST": "127.0.0.1", "PORT": port, "METRICS_HOST": "127.0.0.1", "METRICS_PORT": free_port()}
    podman(
        "run", "--detach", "--name", NAME, "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp",
        "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host", *limits,
        *[word for name, value in settings.items() for word in ("--env", f"REALTIDE_{name}={value}")], IMAGE,
    )  # fmt: skip
    yield f"127.0.0.1:{port}"
    podman("rm", "--force", NAME)


def healthy() -> bool:
    return podman("healthcheck", "run", NAME, check=False).returncode == 0


def logs() -> str:
    done = podman("logs", NAME)
    return done.stdout + done.stderr


def test_it_is_configured_to_run_without_root(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert config["User"] == f"{UID}:{UID}"
    assert config["Entrypoint"] == ["realtide"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert "realtide.server.probe" in str(image["HealthCheck" if "HealthCheck" in image else "Healthcheck"])
    assert set(config["ExposedPorts"]) == {"50051/tcp", "9090/tcp"}


def test_it_serves_where_it_may_write_nothing(container: str) -> None:
    until("the image's own health check", healthy, 180)
    process = Path("/proc") / podman("inspect", "--format", "{{.State.Pid}}", NAME).stdout.strip() / "status"
    status = dict(line.split(":\t", 1) for line in process.read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == [UID] * 4
    assert status["CapEff"] == status["CapBnd"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    for place in ("/", "/opt/realtide/models", "/opt/venv", "/var/tmp"):
        done = podman("exec", NAME, "touch", f"{place}/x", check=False)
        assert done.returncode != 0, place
    podman("exec", NAME, "touch", "/tmp/x")


def test_it_has_no_compiler_no_pip_and_no_torch(container: str) -> None:
    for name in ("gcc", "cc", "g++", "make", "pip", "git"):
        assert podman("exec", NAME, "which", name, check=False).returncode != 0, name
    for name in ("pip", "torch", "onnx"):
        assert podman("exec", NAME, "python", "-c", f"import {name}", check=False).returncode != 0, name
    podman("exec", NAME, "python", "-c", "import realtide, onnxruntime")


def test_it_transcribes(container: str) -> None:
    import soundfile

    until("the image's own health check", healthy, 180)
    samples, rate = soundfile.read(RECORDING, dtype="float32")
    with sync.connect(container) as client, client.speech(sample_rate=rate) as stream:
        stream.send(samples)
        stream.finish()
        text = " ".join(item.text for item in stream if isinstance(item, rt.Final)).strip()
    assert text == "can i get a light roast iced mocha with some sugar"


def test_it_stops_when_it_is_told_to(container: str) -> None:
    until("the image's own health check", healthy, 180)
    podman("stop", "--time", "60", NAME)
    assert podman("inspect", "--format", "{{.State.ExitCode}}", NAME).stdout.strip() == "0"
    lines = [json.loads(line) for line in logs().splitlines() if line.startswith("{")]
    assert [line["message"] for line in lines if "message" in line][-1] == "stopped"


def test_size(image: dict[str, Any]) -> None:
    """Without what the base has: the environment and two models."""
    (under,) = json.loads(podman("image", "inspect", BASE).stdout)
    assert image["Size"] - under["Size"] < 450e6
