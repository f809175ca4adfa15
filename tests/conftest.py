"""What is dear to make and used in several folders."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small video bundle with random weights; its export takes most of a minute."""
    from tests.engines.longlive.bundles import write_bundle

    return write_bundle(tmp_path_factory.mktemp("bundles") / "small-video")


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image bundle with random weights; its export takes half a minute."""
    from tests.engines.easycontrol.bundles import write_bundle

    return write_bundle(tmp_path_factory.mktemp("bundles") / "small-images")
