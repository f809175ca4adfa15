"""The chart as Helm renders it, for every example of values: valid for Kubernetes, hardened, consistent."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from realtide.server.config import ServerConfig
from tools import render_kustomize
from tools.ops_tools import tool

pytestmark = pytest.mark.ops

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "realtide"
EXAMPLES = {path.stem: path for path in sorted((ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))}
VERSIONS = ("1.32.0", "1.35.0")
# Kinds that Kubernetes itself does not know.
FOREIGN = ("GRPCRoute", "ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule")
Manifest = dict[str, Any]

examples = pytest.mark.parametrize("example", EXAMPLES)


def validator() -> Any:
    """Of `make ops-test`, which installs it; `make test` collects this file without."""
    return importlib.import_module("kubernetes_validate")


def helm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("helm"), *map(str, arguments)], capture_output=True, text=True)


@functools.cache
def template(version: str, *arguments: object) -> str:
    """What the chart makes with these arguments of `helm template`."""
    done = helm("template", "live", CHART, "--namespace", "live", "--kube-version", version, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(*arguments: object, version: str = VERSIONS[-1]) -> list[Manifest]:
    return [item for item in yaml.safe_load_all(template(version, *arguments)) if item]


def rendered(example: str, version: str = VERSIONS[-1]) -> list[Manifest]:
    return render("--values", EXAMPLES[example], version=version)


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] in kinds]


def pods(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """The specifications of all pods."""
    found = [item["spec"]["template"]["spec"] for item in of_kind(manifests, "Deployment")]
    return found + [item["spec"] for item in of_kind(manifests, "Pod")]


def containers(manifests: list[Manifest]) -> list[dict[str, Any]]:
    return [one for pod in pods(manifests) for one in (*pod.get("initContainers", []), *pod["containers"])]


def settings(manifest: Manifest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(manifest["data"]["config.yaml"])
    return loaded


def test_helm_finds_nothing_to_complain_of() -> None:
    for path in EXAMPLES.values():
        done = helm("lint", "--strict", CHART, "--values", path)
        assert done.returncode == 0, done.stdout


@examples
@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(example: str, version: str) -> None:
    manifests = rendered(example, version)
    assert {item["kind"] for item in manifests} >= {"Deployment", "Service", "ConfigMap", "Pod"}
    names = [(item["kind"], item["metadata"]["name"]) for item in manifests]
    assert len(set(names)) == len(names)
    for item in manifests:
        if item["kind"] not in FOREIGN:
            validator().validate(item, version.removesuffix(".0"), strict=True)


def test_the_validator_refuses_what_kubernetes_does_not_know() -> None:
    (deployment,) = of_kind(rendered("minimal"), "Deployment")
    deployment["spec"]["replica"] = 2
    with pytest.raises(validator().ValidationError):
        validator().validate(deployment, "1.35", strict=True)


@examples
def test_pods_have_no_more_rights_than_they_need(example: str) -> None:
    manifests = rendered(example)
    for pod in pods(manifests):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 10000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        for volume in pod["volumes"]:
            assert volume.get("emptyDir", {"sizeLimit": 1}).get("sizeLimit"), volume
    for container in containers(manifests):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["requests"]["cpu"]
        assert resources["requests"]["memory"]
        assert resources["limits"]["memory"]
        assert not container["image"].endswith(":latest")


@examples
def test_secrets_are_mounted_or_referred_to_and_never_rendered(example: str) -> None:
    manifests = rendered(example)
    assert not of_kind(manifests, "Secret", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    for item in of_kind(manifests, "ConfigMap"):
        if "config.yaml" in item["data"]:
            assert not {"checkpoint_key", "api_key_pepper"} & set(settings(item))


@examples
def test_the_server_accepts_its_configuration(example: str, tmp_path: Path) -> None:
    files = {}
    for item in of_kind(rendered(example), "ConfigMap"):
        if "config.yaml" in item["data"]:
            values = settings(item)
            for name in ("tls_certificate", "tls_key", "tls_client_ca", "api_key_file"):
                if name in values:
                    assert values[name].startswith("/etc/realtide/")
                    values[name] = tmp_path / name
                    values[name].touch()
            config = ServerConfig.model_validate(values)
            assert (config.port, config.admin_port, config.metrics_port) == (50051, 50052, 9090)
            assert all(model.bundle.is_absolute() for model in config.models)
            files[item["metadata"]["name"]] = config
    assert files.keys() == {item["metadata"]["name"] for item in of_kind(rendered(example), "Deployment")}


@examples
def test_a_pod_has_time_for_its_drain(example: str) -> None:
    manifests = rendered(example)
    configs = {item["metadata"]["name"]: item for item in of_kind(manifests, "ConfigMap")}
    for item in of_kind(manifests, "Deployment"):
        pod = item["spec"]["template"]["spec"]
        (server,) = pod["containers"]
        wait = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
        values = settings(configs[item["metadata"]["name"]])
        config = ServerConfig.model_validate(
            {key: value for key, value in values.items() if not key.startswith(("tls", "api_key"))}
        )
        assert 2 <= wait <= 15
        needed = wait + config.drain_seconds + config.grace_seconds
        assert pod["terminationGracePeriodSeconds"] == needed + 5
        startup = server["startupProbe"]
        assert (
            item["spec"]["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]
        )


@pytest.mark.parametrize(("drain", "wait", "grace"), [(0, 2, 9), (20, 2, 29), (60, 6, 73), (600, 15, 622)])
def test_every_time_of_a_stop_follows_from_one_value(drain: int, wait: int, grace: int) -> None:
    (item,) = of_kind(render("--set", f"defaults.drainSeconds={drain}"), "Deployment")
    pod = item["spec"]["template"]["spec"]
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(wait)]
    assert pod["terminationGracePeriodSeconds"] == grace


def test_longer_grace_of_the_server_is_added() -> None:
    (item,) = of_kind(render("--set-json", "defaults.config.grace_seconds=9.5"), "Deployment")
    assert item["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 6 + 60 + 10 + 5


@examples
def test_selectors_find_the_pods_they_are_meant_for(example: str) -> None:
    manifests = rendered(example)
    labels = {
        item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"]
        for item in of_kind(manifests, "Deployment")
    }
    for item in of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = item["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        chosen = selector.get("matchLabels", selector)
        matching = [name for name, have in labels.items() if chosen.items() <= have.items()]
        assert matching == [item["metadata"]["name"].removesuffix("-headless")]
    for item in of_kind(manifests, "ServiceMonitor", "PodMonitor"):
        chosen = item["spec"]["selector"]["matchLabels"]
        assert all(chosen.items() <= have.items() for have in labels.values())


def test_a_gpu_is_asked_for_and_placed() -> None:
    (item,) = of_kind(rendered("gpu"), "Deployment")
    pod = item["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"]
    assert pod["tolerations"]
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 1800
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    assert "readOnly" not in mounts["plan-cache"]
    assert item["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_keda_scales_on_slots_and_queue() -> None:
    manifests = rendered("keda")
    (scaled,) = of_kind(manifests, "ScaledObject")
    (deployment,) = of_kind(manifests, "Deployment")
    assert "replicas" not in deployment["spec"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert "realtide_session_capacity" in queries[0]
    assert 'state="queued"' in queries[1]
    for query in queries:
        pattern = re.search(r'pod=~"([^"]+)"', query)
        assert pattern is not None
        assert re.fullmatch(pattern[1], f"{deployment['metadata']['name']}-7d9f8b6c5d-x2x4z")


def test_the_autoscaler_asks_for_the_adapters_metric() -> None:
    (scaler,) = of_kind(rendered("hpa"), "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    adapter = yaml.safe_load((ROOT / "deploy/prometheus/adapter/values.yaml").read_text())
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]
    assert metric["pods"]["target"]["averageValue"] == "700m"


def test_routes_send_each_service_to_its_set() -> None:
    manifests = rendered("gateway")
    routes = of_kind(manifests, "GRPCRoute")
    services = {item["metadata"]["name"] for item in of_kind(manifests, "Service")}
    assert {route["spec"]["rules"][0]["matches"][0]["method"]["service"] for route in routes} == {
        "realtide.v1.Speech",
        "realtide.v1.Video",
    }
    for route in routes:
        assert route["spec"]["parentRefs"]
        assert {ref["name"] for rule in route["spec"]["rules"] for ref in rule["backendRefs"]} <= services
    fetching = [pod["initContainers"] for pod in pods(manifests) if "initContainers" in pod]
    assert len(fetching) == 1
    assert fetching[0][0]["args"][:2] == ["models", "fetch"]


def test_hardened_lets_in_only_who_is_named() -> None:
    manifests = rendered("hardened")
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["egress"] == []
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    (config,) = [item for item in of_kind(manifests, "ConfigMap") if "config.yaml" in item["data"]]
    assert settings(config).keys() >= {"tls_certificate", "tls_key", "tls_client_ca", "api_key_file"}
    (deployment,) = of_kind(manifests, "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    by_secret = {variable["name"] for variable in server["env"] if "valueFrom" in variable}
    assert by_secret == {"REALTIDE_CHECKPOINT_KEY", "REALTIDE_API_KEY_PEPPER"}
    assert "@sha256:" in server["image"]
    assert all("grpc" in server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))


def test_the_operators_rules_are_those_of_the_repository_and_pass_promtool(tmp_path: Path) -> None:
    (rule,) = of_kind(rendered("cpu"), "PrometheusRule")
    groups = rule["spec"]["groups"]
    plain = []
    for name in ("objectives", "recording", "alerts"):
        plain += yaml.safe_load((ROOT / f"deploy/prometheus/{name}.yaml").read_text())["groups"]

    def by_name(groups: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        return {
            (
                entry.get("alert") or entry["record"],
                entry["labels"].get("engine") if "labels" in entry else None,
            ): entry
            for group in groups
            for entry in group["rules"]
        }

    assert by_name(groups) == by_name(plain)
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": groups}))
    done = subprocess.run([tool("promtool"), "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dashboards = [
        item
        for item in of_kind(rendered("cpu"), "ConfigMap")
        if "grafana_dashboard" in item["metadata"]["labels"]
    ]
    assert len(dashboards) == len(list((ROOT / "deploy" / "grafana").glob("*.json")))


def test_runbooks_may_be_published_elsewhere() -> None:
    (rule,) = of_kind(rendered("hardened"), "PrometheusRule")
    books = {
        entry["annotations"]["runbook"]
        for group in rule["spec"]["groups"]
        for entry in group["rules"]
        if "alert" in entry
    }
    assert all(book.startswith("https://runbooks.example.com/realtide#realtide") for book in books)


def test_old_clusters_get_what_they_know() -> None:
    manifests = rendered("minimal", "1.20.2")
    (deployment,) = of_kind(manifests, "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["readinessProbe"]["exec"]["command"][:3] == ["python", "-m", "realtide.server.probe"]
    (budget,) = of_kind(rendered("keda", "1.20.2"), "PodDisruptionBudget")
    assert budget["apiVersion"] == "policy/v1beta1"


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("replicas=3", "replicas"),
        ("engineSets.speech.replica=3", "/engineSets/speech"),
        ("defaults.config.queue_limt=3", "queue_limt"),
        ("defaults.config.queue_limit=-1", "queue_limit"),
        ("defaults.config.port=1", "port"),
        ("defaults.drainSeconds=-1", "drainSeconds"),
        ("defaults.autoscaling.kind=vpa", "autoscaling/kind"),
        ("ports.grpc=80", "ports/grpc"),
        ("image.digest=sha256:12", "image/digest"),
    ],
)
def test_helm_refuses_values_that_the_schema_does(setting: str, where: str) -> None:
    done = helm("template", "live", CHART, "--set", setting)
    assert done.returncode != 0
    assert where in done.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["defaults.modelVolume.source=pvc"], "modelVolume.claimName is needed"),
        (["defaults.autoscaling.kind=keda"], "autoscaling.prometheusAddress is needed"),
        (["defaults.gateway.enabled=true"], "gateway.parentRefs names the Gateway"),
    ],
)
def test_what_is_needed_together_is_asked_for(settings: list[str], sentence: str) -> None:
    done = helm("template", "live", CHART, *[word for one in settings for word in ("--set", one)])
    assert done.returncode != 0
    assert sentence in done.stderr


def test_the_kustomize_base_is_what_the_chart_makes_and_can_be_built() -> None:
    assert render_kustomize.main(["--check"]) == 0
    done = subprocess.run(
        [tool("kubectl"), "kustomize", ROOT / "deploy/kustomize/base"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = [item for item in yaml.safe_load_all(done.stdout) if item]
    assert len(of_kind(built, "Deployment", "Service")) == 3
    for item in built:
        validator().validate(item, "1.35", strict=True)


def test_a_stale_base_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_kustomize, "BASE", tmp_path)
    assert render_kustomize.main(["--check"]) == 1
    assert render_kustomize.main([]) == 0
    assert render_kustomize.main(["--check"]) == 0
    (tmp_path / "deployment-old.yaml").touch()
    assert render_kustomize.main(["--check"]) == 1
