"""Which GPU is here, as plan keys name it (ours; extra ``gpu``)."""

from __future__ import annotations

from realtide.engines.runtime.plan_key import Gpu


def detect(index: int = 0) -> Gpu | None:
    """Name, compute capability and driver of a GPU; None if there is none, or nothing that could ask it.

    Args:
        index: of the GPU among those that the driver shows.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return Gpu(_text(name), f"{major}.{minor}", _text(driver))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in old versions
