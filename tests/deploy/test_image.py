"""The Dockerfile and the compose file, as far as they can be judged without building."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from realtide.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DIGEST = r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}"


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in DOCKERFILE


def test_every_stage_starts_from_the_pinned_base_or_another_stage() -> None:
    assert re.search(rf"^ARG PYTHON_BASE={DIGEST}$", DOCKERFILE, re.M)
    bases = dict(reversed(pair) for pair in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M))
    assert len(bases) == DOCKERFILE.count("\nFROM ")
    assert {"cpu", "gpu"} <= set(bases)
    assert all(base == "${PYTHON_BASE}" or base in bases for base in bases.values())
    # A build without a target makes the last one.
    assert list(bases)[-1] == "cpu"


def test_the_final_stages_compile_nothing_and_run_without_root() -> None:
    final = DOCKERFILE.partition("AS runtime\n")[2]
    assert not re.search(r"\b(pip|apt-get|gcc|make)\b", final)
    assert re.search(r"^USER 10001:10001$", final, re.M)
    assert "HEALTHCHECK" in final


def test_the_builder_gets_only_what_it_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {line[1:] for line in rules if line.startswith("!")}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


def test_compose_mounts_what_is_there_and_pins_what_it_pulls() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / "deploy" / source).is_dir(), source
        if "build" not in service:
            assert re.fullmatch(DIGEST, service["image"].removeprefix("docker.io/")), name
        # Nobody but this machine.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    server = services["server"]
    settings = {key.removeprefix("REALTIDE_").lower(): value for key, value in server["environment"].items()}
    config = ServerConfig.model_validate(settings)
    stop = int(server["stop_grace_period"].removesuffix("s"))
    assert stop >= config.drain_seconds + config.grace_seconds + 5
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{config.metrics_port}"]
    assert job["job_name"] == "realtide"
    assert all((ROOT / "deploy/prometheus" / name).is_file() for name in scraped["rule_files"])
