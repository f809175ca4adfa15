"""Checkpoint files as their owners publish them, read tensor by tensor (ours; needs PyTorch).

Pickles are read with ``weights_only``: what could run code is refused. Files are mapped, not loaded, so a
checkpoint costs no more memory than the tensors that are in use.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
}
"""By precision: safetensors' name and PyTorch's."""


class ConvertError(ValueError):
    """A checkpoint cannot be converted; the message is one sentence that names the file and the tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, read when it is asked for."""

    name: str
    """As the file has it."""
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Checkpoint = Mapping[str, Stored]


def read_checkpoint(path: Path, wrappers: Sequence[str] = ()) -> dict[str, Stored]:
    """Tensors of a checkpoint by name.

    Args:
        path: a pickle (``.pt``, ``.pth``), a ``.safetensors`` file, or a directory of these with or without
            an index of shards.
        wrappers: names under which a pickle may hold its tensors; the first that is there is taken.

    Raises:
        ConvertError: the file cannot be read, or holds more than tensors.
    """
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise ConvertError(f"{path}: no such file or directory")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return _pickle(path, wrappers)


def read_settings(path: Path) -> dict[str, Any]:
    """What ``config.json`` in a checkpoint's directory says; empty if there is none. Raises ConvertError."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{file}: must hold an object")
    return values


def write_safetensors(
    path: Path, tensors: Checkpoint, precision: str, on_tensor: Callable[[str, int], None]
) -> None:
    """Write tensors one after the other; the library's own writer wants all of them in memory.

    Args:
        path: file to write.
        tensors: by their new names.
        precision: one of `DTYPES`.
        on_tensor: called with each name and its bytes once it is written.

    Raises:
        ConvertError: a value is not finite in this precision.
    """
    code, dtype = DTYPES[precision]
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + prod(tensors[name].shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            stored = tensors[name]
            value = stored.read().to(dtype).contiguous()
            if not torch.isfinite(value).all():
                raise ConvertError(f"{stored.file}: {stored.name!r} is not finite in {precision}")
            data = value.reshape(-1).view(torch.uint8).numpy()
            start, end = entry["data_offsets"]
            if data.nbytes != end - start:
                raise ConvertError(f"{stored.file}: {stored.name!r} is cut off")
            file.write(data.data)
            on_tensor(name, data.nbytes)


def _directory(path: Path) -> dict[str, Stored]:
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ConvertError(f"{path}: has more than one index: {indices[0].name}, {indices[1].name}")
    if indices:
        return _sharded(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ConvertError(
            f"{path}: must hold one .safetensors file, or an index of several (found: {found})"
        )
    return _safetensors(files[0])


def _sharded(index: Path) -> dict[str, Stored]:
    try:
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConvertError(f"{index}: has no weight_map") from None
    found: dict[str, Stored] = {}
    for name in names:
        if Path(name).name != name:
            raise ConvertError(f"{index}: {name!r} must be a file beside the index")
        shard = _safetensors(index.with_name(name))
        wanted = {tensor for tensor, file in shards.items() if file == name}
        odd = sorted(wanted ^ set(shard))
        if odd:
            lacks = "lacks" if odd[0] in wanted else "is said not to have"
            raise ConvertError(f"{index.with_name(name)}: {lacks} {odd[0]!r}, by {index.name}")
        found |= shard
    return found


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        file: Any = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{path}: {error}") from None

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    return {name: Stored(name, path, shape, reader(name)) for name, shape in shapes.items()}


def _pickle(path: Path, wrappers: Sequence[str]) -> dict[str, Stored]:
    try:
        # Files of old versions of PyTorch are no archives and cannot be mapped.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {named[1]}" if named else "is no checkpoint"
        raise ConvertError(f"{path}: {what}; pickles of more than tensors could run code") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ConvertError(
            f"{path}: cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}"
        ) from None
    for name in wrappers:
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
            break
    if not isinstance(held, dict) or not held:
        raise ConvertError(f"{path}: holds no tensors by name")
    found = {}
    for name, value in held.items():
        if not isinstance(value, Tensor):
            expected = f" (nor is there {' or '.join(map(repr, wrappers))})" if wrappers else ""
            raise ConvertError(f"{path}: {name!r} is no tensor{expected}")
        found[str(name)] = Stored(str(name), path, tuple(value.shape), _constant(value))
    return found


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value.detach()
