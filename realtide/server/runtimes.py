"""Which runtime serves a model: the first of an order that can be had; why those before it were not (ours).

Nothing is fallen back to silently: what was passed over, and why, stands in the log and in what the Models
service says of the model. A runtime is only asked for when the order comes to it, so that a server without a
GPU does not import PyTorch to find out that there is none.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Runtime = Literal["tensorrt", "torch-cuda", "onnxruntime", "torch-cpu"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

BACKENDS: dict[Runtime, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "cuda:0"),
    "torch-cuda": ("torch", "cuda:0"),
    "onnxruntime": ("onnxruntime", "cpu"),
    "torch-cpu": ("torch", "cpu"),
}
"""What an engine is loaded with: its backend and its device."""

_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these is there where NVIDIA's driver is."""
_TORCH_PRECISIONS: tuple[str, ...] = ("fp32", "bf16")
_PLAN_PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
_FP8: dict[Runtime, tuple[str, ...]] = {"tensorrt": ("longlive", "easycontrol"), "torch-cuda": ("longlive",)}
"""Engines that compute in fp8 besides."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A runtime that was not taken, and the reason as a sentence without its full stop."""

    runtime: Runtime
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The runtime that serves a model, and those that stood before it in the order."""

    runtime: Runtime
    passed: tuple[Passed, ...] = ()


def missing(runtime: Runtime, engine: str, precision: str) -> str | None:
    """Why a runtime cannot serve an engine here; None: nothing that can be seen before loading.

    Args:
        runtime: which.
        engine: as the manifest names it.
        precision: that is asked for.
    """
    if runtime == "onnxruntime":
        return None if _installed("onnxruntime") else "onnxruntime is not installed"
    if runtime != "torch-cpu" and not any(path.exists() for path in _DRIVER):
        return "there is no NVIDIA driver on this machine"
    if runtime == "tensorrt" and not (_installed("tensorrt") or _installed("tensorrt_rtx")):
        return "neither tensorrt nor tensorrt_rtx is installed"
    if not _installed("torch"):
        return "PyTorch is not installed"
    if runtime == "tensorrt":
        offered, what = _PLAN_PRECISIONS, "TensorRT"
    else:
        offered, what = _TORCH_PRECISIONS, "PyTorch"
    if engine in _FP8.get(runtime, ()):
        offered = (*offered, "fp8")
    if precision not in offered:
        return f"engine {engine} computes in {' or '.join(offered)} with {what}, {precision} is asked for"
    return None if runtime == "torch-cpu" else _no_cuda()


def _no_cuda() -> str | None:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"PyTorch cannot be imported: {error}"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
