"""Replays golden cases on every backend that is present (ours)."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from realtide.engines.easycontrol import replay as images
from realtide.engines.longlive import replay as video
from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.golden import Backend, CaseError, Report, quiet, read_case
from realtide.engines.runtime.program import ProgramError
from realtide.gpu.timing import Budget

_EXPORT = ("onnx", "onnxscript", "safetensors")


def find(directories: Sequence[Path], pattern: str) -> list[Path]:
    """Cases below `directories` whose names match; one that is in several is taken once.

    Raises:
        CaseError: there is none.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        for path in sorted(directory.rglob("*.safetensors")):
            described = not any(word in path.stem for word in ("weights", "lora"))
            if described and fnmatch(path.stem, pattern):
                found.setdefault(path.name, path)
    if not found:
        raise CaseError(f"no golden case {pattern!r} below {', '.join(map(str, directories))}")
    return list(found.values())


def missing(backend: Backend, device: str = "cpu") -> str | None:
    """Why a backend cannot replay on a device here; None: it can."""
    if backend == "torch":
        return None
    if backend == "tensorrt":
        if not any(map(_present, tensorrt.PACKAGES)):
            return f"not installed: {' or '.join(tensorrt.PACKAGES)}"
        if device == "cpu":
            return "plans run on a GPU only"
    wanted = ("onnxruntime", *_EXPORT) if backend == "onnxruntime" else _EXPORT
    absent = [name for name in wanted if not _present(name)]
    if absent:
        return f"not installed: {', '.join(absent)} (graphs are exported on the spot)"
    return None


def run(cases: Sequence[Path], device: str, seconds: float) -> dict[str, Any]:
    """Replay cases with PyTorch on `device`, with ONNX Runtime on the processor, then through plans.

    Returns:
        For each backend a list of what was found, or why it was skipped.
    """
    budget = Budget(seconds)
    found: dict[str, Any] = {}
    places: dict[Backend, str] = {"torch": device, "onnxruntime": "cpu", "tensorrt": device}
    with _exact(), quiet():
        for backend, where in places.items():
            reason = missing(backend, where)
            if reason:
                found[backend] = {"skipped": reason}
                continue
            replayed = [_case(path, backend, where, budget) for path in cases]
            found[backend] = {"device": where, "cases": replayed}
            if backend == "tensorrt":
                package = tensorrt.load()
                found[backend]["package"] = f"{package.__name__} {package.__version__}"
    return found


def _present(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def failures(found: dict[str, Any]) -> list[str]:
    """Cases that did not give what the reference does."""
    return [
        f"{backend}: {case['case']}"
        for backend, each in found.items()
        for case in each.get("cases", ())
        if not case.get("ok", True)
    ]


def _case(path: Path, backend: Backend, device: str, budget: Budget) -> dict[str, Any]:
    if budget.left <= 0:
        return {"case": path.stem, "skipped": "the time for replays is used up"}
    try:
        described, _ = read_case(path)
        if path.parent.name == "easycontrol" and images.KEY not in described:
            return {
                "case": path.stem,
                "skipped": "a case of a text encoder or the VAE: only tests replay those",
            }
        engine = images if images.KEY in described else video
        report: Report = engine.replay(path, backend, device)
    except (CaseError, ProgramError, ImportError) as error:
        return {"case": path.stem, "ok": False, "error": str(error)}
    worst = max(report.tensors, key=lambda name: report.tensors[name].rel_l2)
    return {
        "case": path.stem,
        "ok": report.ok,
        "tensors": len(report.tensors),
        "worst": worst,
        "rel_l2": report.tensors[worst].rel_l2,
        "max_abs": report.tensors[worst].max_abs,
        "tolerance": report.tolerance,
    }


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Float32 means float32: no TF32 in products and convolutions."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
