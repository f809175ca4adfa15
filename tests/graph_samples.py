"""What holds of the samples and sizes of any bundle's graphs."""

from __future__ import annotations

from realtide.bundle import Bundle
from realtide.engines.runtime.onnx_file import read_graph
from realtide.variants import engine_graphs, manifest_values


def check(bundle: Bundle) -> None:
    """Each graph has a sample that fits its inputs and state, within the sizes that plans are built for."""
    graphs, values = engine_graphs(bundle), manifest_values(bundle)
    sizes, samples = graphs.sizes(values, 4), graphs.samples(values)
    assert set(samples) == set(bundle.manifest.programs)
    for program, sample in samples.items():
        info = read_graph(bundle.graph(program, "float32").read_bytes())
        assert {spec.name for spec in info.state} == set(sample.state)
        for call in sample.calls:
            assert set(call) == {spec.name for spec in info.inputs}
            for spec in info.inputs:
                for dim, have in zip(spec.shape, call[spec.name].shape, strict=True):
                    if isinstance(dim, str):
                        given = sizes[program][dim]
                        assert given.least <= have <= given.most, (program, spec.name, dim)
                    else:
                        assert dim == have
