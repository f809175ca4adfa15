"""Options of the tests that need a cluster."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which image the cluster has."""
    group = parser.getgroup("cluster")
    group.addoption("--image", default="localhost/realtide", help="repository of the image in the cluster")
    group.addoption("--tags", default="v1,v2", help="two tags of it: before and after an update")
