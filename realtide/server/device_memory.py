"""Memory of the GPUs that this process sees, as NVIDIA's driver counts it; nothing where there is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


class DeviceMemory:
    """Reads NVML, which needs the package nvidia-ml-py (in the extra ``gpu``) and a driver.

    What other processes hold on the same GPUs counts too: it is just as much not to be had.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._devices: list[Any] = []
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except pynvml.NVMLError as error:
            log.info("no GPU to watch", extra={"reason": str(error)})
            return
        self._nvml = pynvml

    def read(self) -> Mapping[str, int]:
        """Bytes by kind, all GPUs together: ``device_used`` and ``device_total``; empty without a GPU."""
        if self._nvml is None:
            return {}
        try:
            found = [self._nvml.nvmlDeviceGetMemoryInfo(device) for device in self._devices]
        except self._nvml.NVMLError as error:
            log.warning("GPU memory cannot be read", extra={"reason": str(error)})
            return {}
        return {
            "device_used": sum(memory.used for memory in found),
            "device_total": sum(memory.total for memory in found),
        }
