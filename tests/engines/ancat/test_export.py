"""Exported graphs: what a bundle holds, the joiner, and the causal encoder whose graph has no dial."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from realtide.bundle import load_bundle, verify
from realtide.engines.ancat.config import EncoderConfig, state_shapes
from realtide.engines.ancat.export import export_encoder, export_static
from realtide.engines.ancat.model import JoinerProgram
from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.weights import WeightFile
from tests.engines.ancat.conftest import SmallBundle
from tests.engines.ancat.oracle import Dial, Oracle, small_config, wild


def test_what_the_bundle_holds(bundle: SmallBundle) -> None:
    loaded = load_bundle(bundle.path)
    assert verify(loaded) == []
    assert {file.path for file in loaded.manifest.files} == {
        "onnx/encoder.onnx",
        "onnx/encoder_static.onnx",
        "onnx/joiner.onnx",
        "tokenizer.model",
        "weights.safetensors",
    }
    assert EncoderConfig.from_dict(loaded.manifest.architecture["encoder"]) == bundle.config
    weights = WeightFile(loaded.weights)
    stored = {name for name in bundle.model.state_dict() if not name.startswith("ctc.")}
    assert set(weights) == stored | {"features.mean", "features.std"}
    for name in stored:
        np.testing.assert_array_equal(np.float32(weights[name]), bundle.model.state_dict()[name].numpy())


def test_graphs_hold_no_weights(bundle: SmallBundle) -> None:
    for name in ("encoder", "encoder_static", "joiner"):
        graph = onnx.load(bundle.path / "onnx" / f"{name}.onnx", load_external_data=False).graph
        names = {tensor.name for tensor in graph.initializer}
        held = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert names & set(bundle.model.state_dict())
        assert not {tensor.name for tensor in held} & set(bundle.model.state_dict())
        assert all(np.prod(tensor.dims) < 1000 for tensor in held)


def test_the_joiner_is_the_module(bundle: SmallBundle) -> None:
    loaded = load_bundle(bundle.path)
    program = OrtProgram(loaded.graph("joiner", "float32"), WeightFile(loaded.weights), {})
    rng = np.random.default_rng(0)
    for rows in (0, 1, 5):
        encoded = rng.standard_normal((rows, bundle.config.joiner_dim)).astype(np.float32)
        contexts = rng.integers(0, bundle.config.vocab, (rows, 2))
        have = program.run({"encoded": encoded, "contexts": contexts})["log_probs"]
        with torch.no_grad():
            want = JoinerProgram(bundle.model)(torch.from_numpy(encoded), torch.from_numpy(contexts))
        np.testing.assert_allclose(have, want.numpy(), atol=1e-4)


def test_a_causal_encoder_has_no_dial_and_streams_the_same(tmp_path: Path) -> None:
    config = small_config(rule="causal", right=0, layers=2)
    model = wild(config)
    path = tmp_path / "causal.onnx"
    export_encoder(model, 8, path)
    export_static(model, 8, tmp_path / "static.onnx")  # compared with its module, which streams as the oracle
    static = read_graph((tmp_path / "static.onnx").read_bytes())
    assert [spec.name for spec in static.inputs] == ["windows", "fresh", "slots", "arrived"]
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    state = {
        name: np.zeros((2 * rows, *shape), dtype)
        for name, (rows, shape, dtype) in state_shapes(config, 8).items()
    }
    program = OrtProgram(path, weights, state)
    assert [spec.name for spec in program.inputs] == ["windows", "stream", "position", "slots", "arrived"]
    windows = torch.randn(30, config.window, config.mel_bins, generator=torch.Generator().manual_seed(1))
    found, at = [], 0
    for n in (4, 0, 1, 3, 4, 4, 2, 4, 4, 4):
        out = program.run(
            {
                "windows": windows[at : at + n].numpy(),
                "stream": np.zeros(n, np.int64),
                "position": np.arange(at, at + n),
                "slots": np.array([1]),
                "arrived": np.array([at + n]),
            }
        )
        assert out["position_out"].tolist() == out["available"].tolist() == list(range(at, at + n))
        assert out["more"].tolist() == [0]
        found.append(out["encoded"])
        at += n
    want = Oracle(model.encoder).feed(windows, Dial(), final=True).output.numpy()
    assert at == len(windows)
    assert np.abs(np.concatenate(found) - want).max() < 1e-4
