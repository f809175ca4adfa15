"""Weights of a bundle: one safetensors file, in the dtype it was stored in, read tensor by tensor (ours).

The graphs of a bundle carry no weights. Their initializers are named as the safetensors file's tensors, and
`resolve` produces the values a graph asks for: cast to the graph's dtype, or quantized to int8 by `quantize`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from realtide.engines.runtime.program import Array, ProgramError, TensorSpec
from realtide.engines.runtime.quantize import SCALE, derived, unpack_rows


class WeightFile(Mapping[str, Array]):
    """A safetensors file as a read-only mapping. Tensors are read when asked for and not kept.

    What is stored in bfloat16 is given in float32, and so is what is stored in int8 with a scale for each row
    (``w`` beside ``w@scale``, see `pack_rows`).

    Raises:
        ProgramError: the file is missing or is no safetensors file.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        try:
            file: Any = safe_open(self._path, framework="np")
            self._file = file
            stored = tuple(file.keys())
        except (OSError, SafetensorError) as error:
            raise ProgramError(f"{self._path}: {error}") from error
        self._packed = {name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)}
        self._names = tuple(name for name in stored if not name.endswith(SCALE))
        if lost := self._packed.difference(self._names):
            raise ProgramError(f"{self._path}: {min(lost)!r} has scales and no values")

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        if name in self._packed:
            return self._unpacked(name)
        if self._file.get_slice(name).get_dtype() == "BF16":
            return self._widened(name)
        array: Array = self._file.get_tensor(name)
        return array

    def _unpacked(self, name: str) -> Array:
        values, scales = self._file.get_tensor(name), self._file.get_tensor(name + SCALE)
        if values.dtype != np.int8 or scales.shape != values.shape[:1]:
            raise ProgramError(
                f"{self._path}: {name!r} must be int8 with a scale for each of its {values.shape[:1]} rows, "
                f"not {values.dtype.name} with {scales.shape}"
            )
        return unpack_rows(values, scales)

    def _widened(self, name: str) -> Array:
        """A bfloat16 tensor as float32, whose upper half it is; numpy has no such type."""
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            halves = np.frombuffer(file.read(end - start), "<u2")
        wide: Array = (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
        return wide

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def resolve(spec: TensorSpec, weights: Mapping[str, Array]) -> Array:
    """The value of one initializer, C-contiguous and in the graph's dtype.

    Args:
        spec: name, dtype and shape that the graph declares.
        weights: stored tensors by name (float16 or float32, or integers that are taken as they are).

    Raises:
        ProgramError: there is no such weight, or it does not have the graph's shape, or the graph wants a
            float where an integer is stored or the other way round.
    """
    recipe = derived(spec.name)
    name = recipe[0] if recipe else spec.name
    if name not in weights:
        raise ProgramError(f"the graph wants weight {name!r}, which the weight file lacks")
    make: Callable[[Array], Array] = recipe[1] if recipe else np.asarray
    array = make(weights[name])
    if array.shape != spec.shape:
        raise ProgramError(
            f"weight {spec.name!r} must be {spec.describe()}, not {array.dtype.name}{list(array.shape)}"
        )
    if array.dtype != spec.dtype:
        if array.dtype.kind != "f" or (spec.dtype.kind != "f" and spec.dtype.name != "bfloat16"):
            raise ProgramError(f"weight {spec.name!r} must be {spec.describe()}, not {array.dtype.name}")
        array = array.astype(spec.dtype)
    return np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
