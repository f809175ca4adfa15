"""GPU memory as NVML tells it; NVML itself is replaced, because test machines have no GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from realtide.server.device_memory import DeviceMemory
from realtide.server.metrics import Metrics


class NVMLError(Exception):
    """As in pynvml."""


def nvml(monkeypatch: pytest.MonkeyPatch, used: list[int], *, driver: bool = True) -> ModuleType:
    """A module `pynvml` that sees GPUs with so many of 100 bytes in use."""
    module = ModuleType("pynvml")

    def init() -> None:
        if not driver:
            raise NVMLError("Driver Not Loaded")

    def info(index: int) -> SimpleNamespace:
        if used[index] < 0:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=used[index], total=100)

    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(used),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=info,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_all_gpus_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [30, 5]
    nvml(monkeypatch, used)
    registry = Metrics("1").registry

    def value(kind: str) -> float | None:
        return registry.get_sample_value("realtide_device_memory_bytes", {"kind": kind})

    assert (value("device_used"), value("device_total")) == (35, 200)
    used[0] = 40
    assert value("device_used") == 45
    assert (value("host_resident") or 0) > 1e6


def test_a_gpu_that_is_lost_leaves_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [30]
    nvml(monkeypatch, used)
    memory = DeviceMemory()
    used[0] = -1
    assert memory.read() == {}
    used[0] = 7
    assert memory.read() == {"device_used": 7, "device_total": 100}


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_driver_there_is_nothing(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    nvml(monkeypatch, [1], driver=False)
    if not installed:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    assert DeviceMemory().read() == {}
