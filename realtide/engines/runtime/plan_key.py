"""What a TensorRT plan depends on, as one key (ours).

A plan is code and weights for one graph, one TensorRT, one GPU. TensorRT itself checks a part of that, after
it has begun to read the plan; what it does not check (other weights, another driver) would give wrong numbers
or slow kernels. So the key holds everything, and is compared before TensorRT sees a byte.

TensorRT chooses kernels by timing them, so its plans need the GPU they are built on, and the key names it.
TensorRT for RTX compiles kernels where a plan is loaded: its plans are built without a GPU, and the GPU in
the key is that of a *target*. `PORTABLE` says that none was named and that the plan loads wherever its
flavour and version do; a target with a compute capability is built for that one only, and is kept apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from realtide.engines.runtime.onnx_file import GraphInfo
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.quantize import derived

ANY = "any"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that a plan is for.

    Attributes:
        name: as the driver tells it, for example ``NVIDIA H100 80GB HBM3``.
        capability: compute capability, ``9.0``.
        driver: version of the driver, ``580.95.05``.
    """

    name: str
    capability: str
    driver: str

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.driver.strip():
            raise ValueError("gpu: name and driver must not be empty")
        if self.capability != ANY and not re.fullmatch(r"\d{1,2}\.\d", self.capability):
            raise ValueError(f"gpu: compute capability must be like 9.0, or {ANY!r}, not {self.capability!r}")

    @classmethod
    def parse(cls, text: str) -> Gpu:
        """A target as people write it: ``12.0`` or ``NAME:12.0`` or ``NAME:12.0:DRIVER``; ``any``.

        Raises:
            ValueError: it is none of these.
        """
        if text == ANY:
            return PORTABLE
        parts = text.split(":")
        if len(parts) > 3 or not all(part.strip() for part in parts):
            raise ValueError(
                f"gpu: must be CAPABILITY, NAME:CAPABILITY or NAME:CAPABILITY:DRIVER, not {text!r}"
            )
        if len(parts) == 1:
            parts = [ANY, *parts]
        return cls(parts[0].strip(), parts[1].strip(), parts[2].strip() if len(parts) == 3 else ANY)


PORTABLE = Gpu(ANY, ANY, ANY)
"""No target: only for TensorRT for RTX."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything a plan depends on. Two plans of one key are interchangeable.

    Attributes:
        graph: SHA-256 of the ONNX file.
        weights: SHA-256 of the weights that the plan holds (`weights_digest`); they are not in the graph.
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: of that package.
        gpu: name of the GPU.
        capability: its compute capability.
        driver: version of its driver.
        precision: what the bundle calls the graph's precision.
        profile: sizes of the dynamic dimensions (`tensorrt.describe_sizes`); empty if there are none.
    """

    graph: str
    weights: str
    flavour: str
    version: str
    gpu: str
    capability: str
    driver: str
    precision: str
    profile: str

    @property
    def digest(self) -> str:
        """SHA-256 of all fields with their names, as hex."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, str]:
        """The fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanKey:
        """The reverse of `to_dict`. Raises ValueError: a field is missing, unknown or no text."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names or not all(isinstance(value, str) for value in values.values()):
            raise ValueError("the key's fields are not those of this version")
        return cls(**values)

    def differences(self, wanted: PlanKey) -> list[str]:
        """Each field that is not as wanted, as ``driver 570.86 -> 580.95``: what it is, what it should be."""
        mine, theirs = self.to_dict(), wanted.to_dict()
        return [
            f"{name} {_short(mine[name])} -> {_short(theirs[name])}"
            for name in mine
            if mine[name] != theirs[name]
        ]


def graph_digest(graph: bytes) -> str:
    """SHA-256 of an ONNX file's bytes."""
    return hashlib.sha256(graph).hexdigest()


def weights_digest(info: GraphInfo, weights: Mapping[str, Array]) -> str:
    """SHA-256 of the stored weights that a graph's initializers are made from.

    What the graph makes of them (casts, int8) follows from the graph, which has a digest of its own. Weights
    that the graph does not use do not count, so that a bundle's other parts may change.

    Raises:
        ProgramError: a weight is missing.
    """
    names = sorted({(derived(spec.name) or (spec.name,))[0] for spec in info.external})
    total = hashlib.sha256()
    for name in names:
        if name not in weights:
            raise ProgramError(f"the graph wants weight {name!r}, which the weight file lacks")
        value = weights[name]
        head = json.dumps([name, value.dtype.str, list(value.shape)]).encode()
        total.update(len(head).to_bytes(8, "little") + head)
        total.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _short(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text[:12]
    return text if text and " " not in text else repr(text)
