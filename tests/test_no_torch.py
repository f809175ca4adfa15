"""Serving imports no PyTorch (architecture rule 9): all modules but those named here import without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import realtide

ROOT = Path(realtide.__file__).resolve().parent

NEEDS_TORCH = frozenset(
    {
        # Training and export.
        "realtide.bench.precisions",
        "realtide.bench.recognize",
        "realtide.engines.ancat.export",
        "realtide.engines.ancat.model",
        "realtide.engines.ancat.offline",
        "realtide.engines.ancat.regularizers",
        "realtide.engines.ancat.rnnt",
        "realtide.engines.ancat.stream",
        "realtide.engines.ancat.stream_layer",
        "realtide.engines.ancat.stream_positions",
        "realtide.engines.ancat.stream_static",
        "realtide.engines.ancat.training",
        "realtide.engines.easycontrol.convert",
        "realtide.engines.easycontrol.convert_names",
        "realtide.engines.easycontrol.export",
        "realtide.engines.easycontrol.steps",
        "realtide.engines.easycontrol.text",
        "realtide.engines.easycontrol.transformer",
        "realtide.engines.easycontrol.vae",
        "realtide.engines.longlive.convert",
        "realtide.engines.longlive.convert_names",
        "realtide.engines.longlive.export",
        "realtide.engines.longlive.int8",
        "realtide.engines.longlive.packed",
        "realtide.engines.longlive.rollout",
        "realtide.engines.longlive.rows",
        "realtide.engines.longlive.steps",
        "realtide.engines.longlive.text",
        "realtide.engines.longlive.transformer",
        "realtide.engines.longlive.vae",
        "realtide.engines.runtime.checkpoint_files",
        "realtide.engines.runtime.export",
        "realtide.engines.runtime.fp8",
        "realtide.engines.runtime.fp8_graph",
        "realtide.engines.runtime.fuse",
        "realtide.engines.runtime.host_form",
        "realtide.engines.runtime.in_place",
        "realtide.engines.runtime.int8",
        "realtide.engines.runtime.narrow",
        "realtide.engines.runtime.products",
        "realtide.float8",
        # The torch backend.
        "realtide.engines.ancat.torch_programs",
        "realtide.engines.easycontrol.torch_programs",
        "realtide.engines.longlive.torch_programs",
        "realtide.engines.runtime.device_program",
        "realtide.engines.longlive.plan_programs",
        "realtide.engines.runtime.plan_program",
        "realtide.engines.runtime.plan_replay",
        "realtide.engines.runtime.resident_program",
        "realtide.engines.runtime.torch_memory",
        "realtide.engines.runtime.torch_program",
        # What a machine with a GPU is checked with.
        "realtide.gpu.bench",
        "realtide.gpu.check",
        "realtide.gpu.images",
        "realtide.gpu.replays",
        "realtide.gpu.speech",
        "realtide.gpu.timing",
        "realtide.gpu.video",
    }
)

SCRIPT = """
import importlib, importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchaudio", "onnx", "onnxscript", "onnx_ir"):
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Block())
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
print("\\n".join(failed))
"""


def all_modules() -> set[str]:
    names = set()
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def failures(names: set[str]) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *sorted(names)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1] if result.stdout.strip() else []


def test_serving_imports_no_torch_and_no_onnx_package() -> None:
    modules = all_modules()
    assert {"realtide.bundle", "realtide.engines.runtime.ort", "realtide.server.app"} <= modules
    assert failures(modules - NEEDS_TORCH) == []


def test_the_list_of_exceptions_is_current() -> None:
    assert all_modules() >= NEEDS_TORCH
    blocked = {line.partition(":")[0] for line in failures(set(NEEDS_TORCH))}
    assert blocked == NEEDS_TORCH
