"""Graphs in half precision: they compute nearly what float32 does, and TensorRT compiles them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from realtide.engines.easycontrol.export import export_all
from realtide.engines.easycontrol.layout import PROGRAMS
from realtide.engines.easycontrol.programs import ImagePrograms, Programs
from realtide.engines.easycontrol.torch_programs import Modules, image_programs
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.tensorrt import Sizes, build_engine
from tests.engines.easycontrol import small
from tests.engines.easycontrol.conftest import random

SIZES = {
    "batch": Sizes(1, 2, 4),
    "tokens": Sizes(4, 12, 64),
    "positions": Sizes(28, 36, 88),
    "condition_tokens": Sizes(16, 16, 32),
    "height": Sizes(4, 6, 16),
    "width": Sizes(4, 8, 16),
}
NAMES = tuple(vars(PROGRAMS).values())


@dataclass
class Half:
    """All graphs in half precision, their weights, and the programs in float32."""

    graphs: Programs[Path]
    weights: dict[str, Array]
    wide: ImagePrograms


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    made = small.modules()
    weights: dict[str, Array] = {}
    for prefix, part in made.parts().items():
        weights |= {prefix + name: value.numpy() for name, value in part.state_dict().items()}
    narrow = Modules(**{name: copy.deepcopy(part).half() for name, part in vars(made).items()})
    graphs = export_all(narrow, small.LONG, small.POOLED, tmp_path_factory.mktemp("half"))
    return Half(graphs, weights, image_programs(made, small.LONG))


def feeds(program: OrtProgram) -> dict[str, Array]:
    """Something to feed a program in float32."""
    found: dict[str, Array] = {}
    for number, spec in enumerate(program.inputs):
        shape = [dim if isinstance(dim, int) else SIZES[str(dim)].usual for dim in spec.shape]
        if spec.dtype == np.int64:
            found[spec.name] = np.arange(shape[0]) % 60
        else:
            scale = 0.3 if spec.name.startswith(("up", "down")) else 1.0
            found[spec.name] = scale * random(number, *shape)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_graphs_in_half_precision_are_nearly_those_in_float32(half: Half, name: str) -> None:
    graph = OrtProgram(getattr(half.graphs, name), half.weights, {})
    assert all(spec.dtype in (np.float16, np.int64) for spec in (*graph.inputs, *graph.outputs))
    given = feeds(graph)
    want = getattr(half.wide, name).run(given)
    narrow = {k: v if v.dtype == np.int64 else v.astype(np.float16) for k, v in given.items()}
    for output, have in graph.run(narrow).items():
        wide = want[output].numpy()
        gap = np.linalg.norm(have.astype(np.float64) - wide) / np.linalg.norm(wide)
        assert gap < 0.03, output


@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_compiles_every_graph(half: Half, name: str) -> None:
    path = getattr(half.graphs, name)
    outputs = onnx.load(path, load_external_data=False).graph.output
    assert {value.type.tensor_type.elem_type for value in outputs} == {onnx.TensorProto.FLOAT16}
    assert len(build_engine(path, half.weights, SIZES)) > 10_000


def test_a_step_without_conditions_compiles_too(half: Half) -> None:
    sizes = SIZES | {"condition_tokens": replace(SIZES["condition_tokens"], least=0, usual=0)}
    assert len(build_engine(half.graphs.denoise, half.weights, sizes)) > 1000
