"""A safetensors file by NumPy alone, for golden cases (ours).

Serving reads weights by the library `safetensors`. Replaying a golden case is also done on machines that
have PyTorch and little else, so cases are read without it. The format: eight bytes of length, little endian;
so many bytes of JSON (name -> dtype, shape and offsets, and `__metadata__`); the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from realtide.engines.runtime.program import Array

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_MOST_HEADER = 100 << 20


class TensorFileError(ValueError):
    """A file is no safetensors file, or has a dtype that is not read here; the message names the file."""


class TensorFile(Mapping[str, Array]):
    """The tensors of a file by name. They are read when asked for and not kept.

    Args:
        path: the file.

    Raises:
        TensorFileError: see there.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise TensorFileError(f"{path}: no safetensors file: its header would be {length} bytes")
            try:
                header: Any = json.loads(file.read(length))
                self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
                self._entries = {
                    str(name): (
                        str(e["dtype"]),
                        tuple(map(int, e["shape"])),
                        tuple(map(int, e["data_offsets"])),
                    )
                    for name, e in header.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TensorFileError(f"{path}: no safetensors file: {error!r}") from None
        self._start = 8 + length
        for name, (dtype, shape, offsets) in self._entries.items():
            if dtype not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise TensorFileError(f"{path}: {name!r} is {dtype}, must be one of {known}")
            wanted = prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
            within = len(offsets) == 2 and 0 <= offsets[0] <= offsets[1] <= size - self._start
            if not within or offsets[1] - offsets[0] != wanted or any(n < 0 for n in shape):
                raise TensorFileError(f"{path}: {name!r} does not lie in the file as its header says")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; reads no tensor."""
        return {name: shape for name, (_, shape, _) in self._entries.items()}

    def __getitem__(self, name: str) -> Array:
        dtype, shape, (begin, _) = self._entries[name]
        array: Array = np.fromfile(self._path, _DTYPES[dtype], prod(shape), offset=self._start + begin)
        return array.reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
