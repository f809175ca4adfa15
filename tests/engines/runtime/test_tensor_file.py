"""The reader of golden cases agrees with the library, and refuses what is no such file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realtide.engines.runtime.program import Array
from realtide.engines.runtime.tensor_file import TensorFile, TensorFileError


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
    tensors: dict[str, Array] = {
        kind: (np.arange(6).reshape(2, 3) % 2 + (kind != "?")).astype(kind) for kind in kinds
    }
    tensors |= {"none": np.zeros((0, 4), np.float32), "scalar": np.array(2.5, np.float32)}
    save_file(tensors, path, {"case": "{}"})
    file, library = TensorFile(path), load_file(path)
    assert file.metadata == {"case": "{}"}
    assert set(file) == set(library) == set(tensors)
    assert len(file) == len(tensors)
    assert "f4" in file
    assert "f5" not in file
    assert file.shapes == {name: array.shape for name, array in tensors.items()}
    for name, array in library.items():
        assert file[name].dtype == array.dtype
        np.testing.assert_array_equal(file[name], array)


def written(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, ...] = (0, 8)) -> object:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry("BF16"), "'x' is BF16, must be one of"),
        (entry(offsets=(0, 12)), "does not lie in the file"),
        (entry(offsets=(8, 16)), "does not lie in the file"),
        (entry(offsets=(-8, 0)), "does not lie in the file"),
        (entry(shape=(3,)), "does not lie in the file"),
        (entry(shape=(-1, -2)), "does not lie in the file"),
        (entry(offsets=(0, 8, 8)), "does not lie in the file"),
        ({"x": {"dtype": "F32"}}, "no safetensors file"),
        ({"x": 3}, "no safetensors file"),
        ([1], "no safetensors file"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(TensorFileError, match=message):
        TensorFile(written(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize(
    "data", [b"", b"abc", (1 << 60).to_bytes(8, "little"), bytes(8), b"\x05" + bytes(7) + b"{bad}"]
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(TensorFileError, match="no safetensors file"):
        TensorFile(path)
