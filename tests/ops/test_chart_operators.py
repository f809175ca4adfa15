"""What the chart makes for the operators of Prometheus and KEDA has fields that they know, of their types."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.deploy.kept import assert_kept
from tests.ops.test_chart import EXAMPLES, FOREIGN, of_kind, rendered

pytestmark = pytest.mark.ops

# Models made of the operators' own definitions. Of GRPCRoute PyPI has none.
MODELS = {
    "PodMonitor": "prometheus_operator.v1",
    "PrometheusRule": "prometheus_operator.v1",
    "ScaledObject": "keda.v1alpha1",
    "ServiceMonitor": "prometheus_operator.v1",
}


def check(item: dict[str, Any]) -> None:
    """Raises ValidationError for a wrong type, AssertionError for a field that the operator does not know."""
    # `make ops-test` installs them; `make test` collects this file without.
    kinds = importlib.import_module(f"cloudcoil.models.{MODELS[item['kind']]}")
    model = getattr(kinds, item["kind"]).model_validate(item)
    assert_kept(item, model.model_dump(by_alias=True, mode="json", exclude_unset=True), item["kind"])


def test_operators_know_every_field() -> None:
    seen = set()
    for example in EXAMPLES:
        for item in of_kind(rendered(example), *MODELS):
            check(item)
            seen.add(item["kind"])
    assert seen == set(MODELS)
    assert set(FOREIGN) - seen == {"GRPCRoute"}


def test_unknown_fields_and_wrong_types_are_seen() -> None:
    (scaled,) = of_kind(rendered("keda"), "ScaledObject")
    scaled["spec"]["minReplicas"] = 1
    with pytest.raises(AssertionError, match=r"ScaledObject\.spec\.minReplicas"):
        check(scaled)
    del scaled["spec"]["minReplicas"]
    scaled["spec"]["minReplicaCount"] = "one"
    with pytest.raises(ValueError, match="minReplicaCount"):
        check(scaled)
