"""Golden cases of public reference implementations: how they are read and compared (ours).

A case is a safetensors file whose metadata describes it in JSON under ``case``; its weights lie beside it, in
files with ``weights`` in their names. Serving never imports this, and it needs NumPy alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from realtide.engines.runtime.program import Array

if TYPE_CHECKING:
    from realtide.bundle import Precision
from realtide.engines.runtime.tensor_file import TensorFile, TensorFileError

Backend = Literal["torch", "onnxruntime", "tensorrt"]
TOLERANCE: Mapping[Backend, float] = {"torch": 1e-5, "onnxruntime": 1e-4, "tensorrt": 1e-4}
"""Largest relative L2 difference of a tensor that passes."""
NARROW: Mapping[Precision, float] = {"float16": 0.01, "bfloat16": 0.07, "int8": 0.09, "float8": 0.14}
"""The same for graphs in another precision than the reference's: twice what the worst tensor of all cases has
(0.0046, 0.035, 0.043, 0.068), when semantics are right.
"""
ELSEWHERE = 1e-4
"""The same for `torch` on another device than the processor, whose kernels add up in another order."""


class CaseError(ValueError):
    """A file is no case that can be replayed; the message is one sentence."""


class Named(dict[str, Any]):
    """Parts of a case by name; one that is not there is the case's fault."""

    def __missing__(self, name: str) -> Any:
        raise CaseError(f"the case has no {name!r}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence logging for a while: the exporter warns about its own internals, on standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a tensor is from the reference's.

    Attributes:
        rel_l2: L2 norm of the difference over that of the reference.
        max_abs: largest absolute difference.
    """

    rel_l2: float
    max_abs: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a replay found: tensors by name, and whether all are within the backend's tolerance."""

    case: str
    backend: Backend
    tensors: dict[str, Difference]
    device: str = "cpu"
    precision: Precision = "float32"

    @property
    def tolerance(self) -> float:
        """Largest relative L2 difference that passes."""
        if self.precision != "float32":
            return NARROW[self.precision]
        return TOLERANCE[self.backend] if self.device == "cpu" else ELSEWHERE

    @property
    def ok(self) -> bool:
        """True if every tensor passes; NaN does not."""
        return all(found.rel_l2 <= self.tolerance for found in self.tensors.values())


def check_precision(backend: Backend, precision: Precision) -> None:
    """Raises CaseError: only graphs come in other precisions than float32."""
    if precision != "float32" and (backend != "onnxruntime" or precision not in NARROW):
        raise CaseError(
            f"precision must be float32 with the backend {backend}, or one of float32, {', '.join(NARROW)} "
            f"with onnxruntime, not {precision!r}"
        )


def difference(have: Array, want: Array) -> Difference:
    """Compare two arrays, in float64. Raises CaseError if their shapes differ."""
    if have.shape != want.shape:
        raise CaseError(f"the replay gives {list(have.shape)} where the case has {list(want.shape)}")
    gap = have.astype(np.float64) - want.astype(np.float64)
    norm = float(np.linalg.norm(want.astype(np.float64)))
    rel_l2 = float(np.linalg.norm(gap)) / norm if norm else float(np.linalg.norm(gap))
    return Difference(rel_l2, float(np.abs(gap).max(initial=0.0)))


def read_case(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """A case's description and tensors; what it lacks raises CaseError when it is asked for."""
    try:
        file = TensorFile(path)
        case = json.loads(file.metadata["case"], object_hook=Named)
        if not isinstance(case, dict):
            raise CaseError(f"{path}: its case is no JSON object")
        return case, Named(file.items())
    except KeyError:
        raise CaseError(f"{path}: no case: its metadata has no 'case'") from None
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}") from error
    except TensorFileError as error:
        raise CaseError(str(error)) from error
    except json.JSONDecodeError as error:
        raise CaseError(f"{path}: {error}") from error


def weights_beside(path: Path, names: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of the file beside a case that has exactly these names and shapes."""
    near = sorted(path.parent.glob("*weights*.safetensors"))
    for other in near:
        try:
            file = TensorFile(other)
            if file.shapes == {name: tuple(value.shape) for name, value in names.items()}:
                return dict(file)
        except (OSError, TensorFileError):
            continue  # another case's; if none is left the error below says so
    raise CaseError(
        f"{path}: no *weights*.safetensors beside it has the {len(names)} tensors of its model"
        f" ({len(near)} looked at)"
    )
