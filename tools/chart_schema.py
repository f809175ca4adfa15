"""The schema of the Helm chart's values: unknown keys and values out of range are refused.

Settings of the server come from `ServerConfig`, except those that the chart derives from other values.
"""

from __future__ import annotations

import json
from typing import Any

from realtide.server.config import ServerConfig

Schema = dict[str, Any]

# What the chart sets itself: addresses, ports, files of mounted Secrets, and secrets by reference.
DERIVED = (
    "admin_host",
    "admin_port",
    "api_key_file",
    "api_key_pepper",
    "checkpoint_key",
    "drain_seconds",
    "host",
    "metrics_enabled",
    "metrics_host",
    "metrics_port",
    "models",
    "port",
    "port_file",
    "tls_certificate",
    "tls_client_ca",
    "tls_key",
)

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 1}
SECONDS: Schema = {"type": "integer", "minimum": 0, "maximum": 86400}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1024, "maximum": 65535}  # no capability to bind lower ones
LABELS: Schema = {"type": "object", "additionalProperties": STRING}
# Kubernetes' own types; the API server checks them.
ANY_OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": ANY_OBJECT}
STRINGS: Schema = {"type": "array", "items": STRING}
QUANTITY: Schema = {"type": ["string", "number"], "pattern": r"^[0-9.]+(m|[kMGTPE]i?)?$"}
PATH: Schema = {"type": "string", "pattern": "^/"}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
AMOUNT: Schema = {"type": ["integer", "string"], "pattern": "^[0-9]+%?$", "minimum": 0}


def closed(**properties: Schema) -> Schema:
    """An object with these keys at most."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def choice(*values: str) -> Schema:
    """One of these strings."""
    return {"enum": list(values)}


def server_settings() -> Schema:
    """The settings that `config` of an engine set may have."""
    whole = ServerConfig.model_json_schema()
    properties = {
        name: {key: value for key, value in rule.items() if key not in ("default", "title")}
        for name, rule in whole["properties"].items()
        if name not in DERIVED
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def models() -> Schema:
    """Bundles: names or paths, or mappings as in the server's setting `models`."""
    model = ServerConfig.model_json_schema()["$defs"]["ModelConfig"]
    return {"type": "array", "items": {"anyOf": [{"type": "string", "minLength": 1}, model]}}


def engine_set() -> Schema:
    """What an engine set, and `defaults`, may have."""
    resources = {"type": "object", "additionalProperties": QUANTITY}
    download = closed(
        url={"type": "string", "pattern": "^https?://"},
        sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"},
    )
    download["required"] = ["url", "sha256"]
    return closed(
        replicas={"type": "integer", "minimum": 0},
        models=models(),
        modelVolume=closed(
            source=choice("image", "pvc", "download"),
            mountPath=PATH,
            claimName=NAME,
            downloads={"type": "array", "items": download},
            sizeLimit=QUANTITY,
        ),
        planCache=closed(enabled=BOOLEAN, mountPath=PATH, claimName=NAME, sizeLimit=QUANTITY),
        config=server_settings(),
        drainSeconds=SECONDS,
        startupSeconds={"type": "integer", "minimum": 5, "maximum": 86400},
        readinessService=STRING,
        resources=closed(requests=resources, limits=resources),
        gpu=closed(count={"type": "integer", "minimum": 0}, resource=STRING, runtimeClassName=NAME),
        image=closed(repository=STRING, tag=STRING, digest=DIGEST),
        strategy=closed(maxSurge=AMOUNT, maxUnavailable=AMOUNT),
        nodeSelector=LABELS,
        tolerations=OBJECTS,
        affinity=ANY_OBJECT,
        spread=BOOLEAN,
        priorityClassName=NAME,
        podAnnotations=LABELS,
        podLabels=LABELS,
        env=OBJECTS,
        service=closed(type=choice("ClusterIP", "NodePort", "LoadBalancer"), annotations=LABELS),
        gateway=closed(enabled=BOOLEAN, parentRefs=OBJECTS, hostnames=STRINGS, services=STRINGS),
        autoscaling=closed(
            kind=choice("none", "hpa", "keda"),
            minReplicas=COUNT,
            maxReplicas=COUNT,
            slotsUsed=SHARE,
            queued=POSITIVE,
            scaleDownSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
            metric=STRING,
            prometheusAddress=STRING,
        ),
        podDisruptionBudget=closed(enabled=BOOLEAN, maxUnavailable=AMOUNT),
    )


def schema() -> Schema:
    """The whole schema."""
    by_engine = {"type": "object", "additionalProperties": POSITIVE}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart realtide",
        **closed(
            **{"global": ANY_OBJECT},  # Helm's own, when the chart is part of another
            image=closed(
                repository={"type": "string", "minLength": 1},
                tag=STRING,
                digest=DIGEST,
                pullPolicy=choice("Always", "IfNotPresent", "Never"),
            ),
            imagePullSecrets=OBJECTS,
            nameOverride=NAME,
            fullnameOverride=NAME,
            commonLabels=LABELS,
            engineSets={
                "type": "object",
                "propertyNames": {"pattern": "^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$"},
                "additionalProperties": {"$ref": "#/$defs/engineSet"},
            },
            defaults={"$ref": "#/$defs/engineSet"},
            ports=closed(grpc=PORT, admin=PORT, metrics=PORT),
            tls=closed(secretName=NAME, clientCA=BOOLEAN),
            apiKeys=closed(secretName=NAME, key=STRING, pepperKey=STRING),
            checkpointKey=closed(secretName=NAME, key=STRING),
            serviceAccount=closed(create=BOOLEAN, name=NAME, annotations=LABELS),
            networkPolicy=closed(enabled=BOOLEAN, clients=OBJECTS, monitoring=OBJECTS, egress=OBJECTS),
            monitoring=closed(
                kind=choice("none", "ServiceMonitor", "PodMonitor"),
                interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                labels=LABELS,
                rules=closed(
                    enabled=BOOLEAN,
                    labels=LABELS,
                    runbooks=STRING,
                    objectives=closed(
                        slotsUsed=SHARE,
                        queueWaitSeconds=by_engine,
                        deliveredFps=by_engine,
                        promptSwitchSeconds=by_engine,
                        finalDelaySeconds=by_engine,
                        deadlineMisses=SHARE,
                        sessionsFailed=SHARE,
                        callsFailed=SHARE,
                        eventLoopLagSeconds=POSITIVE,
                        deviceMemory=SHARE,
                    ),
                ),
                dashboards=closed(enabled=BOOLEAN, labels=LABELS, annotations=LABELS),
            ),
        ),
        # `speech: {}` and `speech:` are the same.
        "$defs": {"engineSet": {**engine_set(), "type": ["object", "null"]}},
    }


def render() -> str:
    """The schema as JSON."""
    return json.dumps(schema(), indent=1) + "\n"
