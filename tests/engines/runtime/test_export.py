"""What the exporter promises about its files, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.in_place import check_in_place
from realtide.engines.runtime.ort import OrtProgram, read_graph_file
from realtide.engines.runtime.program import ProgramError
from tests.engines.runtime.cell import DYNAMIC, Cell, Exported, feeds, state, tensors


def test_the_file_is_small_and_tells_nothing_of_the_machine(exported: Exported) -> None:
    data = exported.graph.read_bytes()
    assert len(data) < 4000
    for trace in (b".py", b"/", b"torch.nn", b"stack"):
        assert trace not in data


def test_weights_keep_their_names_and_layout(exported: Exported) -> None:
    stored = exported.module.state_dict()
    specs = {spec.name: spec.shape for spec in exported.program.info.external}
    assert specs == {name: tuple(value.shape) for name, value in stored.items()}
    assert all(torch.equal(value, stored[name]) for name, value in exported.program.weights.items())
    # None is stored under another name either: what is inline are shapes and axes.
    model = onnx.load(exported.graph, load_external_data=False)
    inline = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert all(int(np.prod(t.dims)) <= 2 for t in inline)


def test_specs_are_in_the_callers_order_and_words(exported: Exported) -> None:
    info = exported.program.info
    assert info == read_graph_file(exported.graph)
    assert [(s.name, s.describe()) for s in (*info.inputs, *info.state)] == [
        ("x", "float32[n, 16]"),
        ("token", "int64[n]"),
        ("rows", "int64[n]"),
        ("mask", "bool[m]"),
        ("keys", "float32[R, 16]"),
        ("values", "float32[R, 16]"),
    ]
    assert [s.name for s in info.outputs] == ["y", "picked"]


class Indexing(nn.Module):
    """Whatever the exporter spells out at length."""

    def forward(self, x: Tensor, rows: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """x [n, 2], rows [n] int64, state [r, 2] -> rows of x whose first number is positive, as doubled."""
        chosen = (x[:, 0] > 0).nonzero().squeeze(1)
        written = torch.ops.aten.index_put(state, [rows], x)
        return written[rows.unsqueeze(0)], x.index_select(0, chosen), chosen * 2, written


def test_indexing_is_written_in_few_operators(tmp_path: Path) -> None:
    path = tmp_path / "indexing.onnx"
    examples = [
        {"x": torch.randn(n, 2, generator=torch.Generator().manual_seed(n)), "rows": torch.arange(n).flip(0)}
        for n in (5, 0, 1, 6)
    ]
    dynamic = {"x": {0: "n"}, "rows": {0: "n"}, "state": {0: "r"}}
    # Its results are compared with the module's.
    export_program(
        Indexing(), examples, {"state": torch.zeros(7, 2)}, ["read", "kept", "twice"], path, dynamic=dynamic
    )
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "Transpose" not in operators
    assert "GatherND" not in operators
    assert operators.count("Reshape") == 1  # of what NonZero found
    assert operators.count("NonZero") == 1


class Halves(nn.Module):
    """Two slices of one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [n, 4] -> its halves."""
        return x[:, :2], x[:, 2:]


def test_slices_are_left_alone(tmp_path: Path) -> None:
    """The optimizer's search for pairs of slices takes most of a deep model's export; it is left out."""
    rule = dict(vars(slice_split_rule))
    export_program(Halves(), [{"x": torch.randn(3, 4)}], {}, ["a", "b"], tmp_path / "x.onnx")
    graph = onnx.load(tmp_path / "x.onnx").graph
    assert [node.op_type for node in graph.node] == ["Slice", "Slice"]
    assert vars(slice_split_rule) == rule  # others' exports have it again


def test_exports_are_reproducible(exported: Exported, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    examples = [tensors(feeds(count, seed)) for seed, count in enumerate((3, 0, 1, 9))]
    export_program(exported.module, examples, tensors(state()), ["y", "picked"], again, dynamic=DYNAMIC)
    assert again.read_bytes() == exported.graph.read_bytes()


@pytest.mark.parametrize("opset", [18, 24])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "cell.onnx"
    examples = [tensors(feeds(count)) for count in (3, 0)]
    export_program(Cell(), examples, tensors(state()), ["y", "picked"], path, dynamic=DYNAMIC, opset=opset)
    assert onnx.load(path, load_external_data=False).opset_import[0].version == opset


class Wrapped(nn.Module):
    """Takes its state as a variable number of arguments, as a module with many caches does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        y = self.model(x)
        rows = torch.arange(x.shape[0])
        return (y, *(cache.index_put((rows,), y + index) for index, cache in enumerate(caches)))


def test_weights_can_be_renamed_and_state_can_be_variadic(tmp_path: Path) -> None:
    module = Wrapped(nn.Linear(4, 4))
    caches = {"layers.0.k": torch.zeros(6, 4), "layers.1.k": torch.zeros(6, 4)}
    path = tmp_path / "wrapped.onnx"
    program = export_program(
        module,
        [{"x": torch.randn(n, 4)} for n in (3, 6)],
        caches,
        ["y"],
        path,
        dynamic={"x": {0: "n"}, **{name: {0: "R"} for name in caches}},
        rename=lambda name: name.removeprefix("model."),
    )
    assert set(program.weights) == {"weight", "bias"}
    arrays = {name: np.zeros((9, 4), np.float32) for name in caches}
    ort = OrtProgram(path, {name: value.numpy() for name, value in program.weights.items()}, arrays)
    y = ort.run({"x": np.ones((2, 4), np.float32)})["y"]
    np.testing.assert_array_equal(arrays["layers.1.k"][:2], y + 1)
    assert not arrays["layers.1.k"][2:].any()


class Reader(nn.Module):
    """Reads rows of the cache after it has computed new ones: the old values, as written here."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        self.old = old

    def forward(self, x: Tensor, rows: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        following = cache.index_put((rows,), x)
        source = cache if self.old else following
        return source[rows] * 2, following


def cache_examples() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    return [{"x": torch.randn(3, 4), "rows": torch.tensor([2, 0, 1])}], {"cache": torch.zeros(8, 4)}


def test_a_read_of_old_state_beside_the_write_is_refused(tmp_path: Path) -> None:
    examples, caches = cache_examples()
    with pytest.raises(ProgramError, match=r"state 'cache' is read by \w+ .* after the state's update"):
        export_program(Reader(old=True), examples, caches, ["y"], tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()
    export_program(Reader(old=False), examples, caches, ["y"], tmp_path / "yes.onnx")


class Shift(nn.Module):
    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), torch.cat([cache[1:], x[:1]])


def test_state_that_is_rebuilt_instead_of_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"state 'cache' cannot be updated in place: .* Concat"):
        export_program(
            Shift(), [{"x": torch.ones(1, 4)}], {"cache": torch.zeros(8, 4)}, ["y"], tmp_path / "g"
        )


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(300, 200), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        table = self.get_buffer("table")
        return x @ table


def test_a_large_constant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"\[300, 200\] would be stored in the graph"):
        export_program(Constant(), [{"x": torch.ones(2, 300)}], {}, ["y"], tmp_path / "g")


class TwoFaced(nn.Module):
    """Computes something else while it is being exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (0.0 if torch.compiler.is_exporting() else 1.0)


def test_a_graph_that_differs_from_the_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"graph and module differ by 1, more than 0\.0001"):
        export_program(TwoFaced(), [{"x": torch.ones(2)}], {}, ["y"], tmp_path / "g")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 17}, r"opset must be in 18\.\.24, not 17"),
        ({"examples": []}, "at least one set of inputs"),
        ({"outputs": ["x"]}, "tensor name 'x' is used twice"),
        ({"outputs": ["y.next"]}, r"'y\.next' is not a tensor name"),
        ({"dynamic": {"z": {0: "n"}}}, "dynamic names 'z'"),
        ({"examples": [{"x": torch.ones(1)}, {"w": torch.ones(1)}]}, "example 1 has inputs"),
    ],
)
def test_calls_are_checked(change: dict[str, object], message: str, tmp_path: Path) -> None:
    call: dict[str, object] = {"examples": [{"x": torch.ones(1)}], "state": {}, "outputs": ["y"]}
    with pytest.raises(ValueError, match=message):
        export_program(nn.Identity(), path=tmp_path / "g", **{**call, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rename gives two weights one name"):
        export_program(
            nn.Linear(1, 1), [{"x": torch.ones(1)}], {}, ["y"], tmp_path / "g", rename=lambda name: "w"
        )


def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], []))


def test_in_place_check_sees_through_views_and_dependencies() -> None:
    node = helper.make_node
    write = node("ScatterND", ["s", "i", "v"], ["s.next"])
    view = node("Reshape", ["s", "shape"], ["flat"])
    late = graph(view, node("Relu", ["flat"], ["v"]), write, node("Gather", ["flat", "j"], ["y"]))
    with pytest.raises(ProgramError, match="state 's' is read by Gather 'y'"):
        check_in_place(late, {"s": "s.next"})
    feeding = graph(node("Gather", ["s", "j"], ["old"]), node("Relu", ["old"], ["v"]), write)
    check_in_place(feeding, {"s": "s.next"})
    shape_only = graph(write, node("Shape", ["s"], ["n"]))
    check_in_place(shape_only, {"s": "s.next"})
    twice = graph(node("ScatterND", ["s", "i", "v"], ["t"]), node("ScatterND", ["t", "j", "v"], ["s.next"]))
    with pytest.raises(ProgramError, match=r"'s\.next' is written by ScatterND from 't'"):
        check_in_place(twice, {"s": "s.next"})
    with pytest.raises(ProgramError, match=r"nothing writes 's\.next'"):
        check_in_place(graph(), {"s": "s.next"})
    with pytest.raises(ProgramError, match="written with values or indices that are itself"):
        check_in_place(graph(node("ScatterND", ["s", "i", "s"], ["s.next"])), {"s": "s.next"})
    aliased = graph(node("Identity", ["s"], ["v"]), write)
    with pytest.raises(ProgramError, match="written with values or indices that are itself"):
        check_in_place(aliased, {"s": "s.next"})
    body = helper.make_graph(
        [node("Relu", ["s"], ["y"])], "then", [], [helper.make_empty_tensor_value_info("y")]
    )
    branch = graph(write, node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    with pytest.raises(ProgramError, match="state 's' is read by If 'y'"):
        check_in_place(branch, {"s": "s.next"})
