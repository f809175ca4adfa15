"""The transformer's graphs with int8 matrix products, for the CPU (ours; extra ``export``).

Activations are quantized row by row, a token at a time, so nothing has to be calibrated. The VAE stays float:
it is convolutions, which this does not touch. So do prompts and the text encoder, which run once per prompt.
"""

from __future__ import annotations

from pathlib import Path

from realtide.engines.longlive.programs import Passes
from realtide.engines.runtime.int8 import quantize_graph


def quantize_passes(graphs: Passes[Path]) -> Passes[Path]:
    """Write the int8 variant of each pass beside it (``denoise.onnx`` to ``denoise.int8.onnx``).

    Returns:
        The graphs of an int8 stream; `prompt` is the float one.

    Raises:
        ProgramError: a graph has no product that is large enough.
    """

    def quantized(path: Path) -> Path:
        target = path.with_suffix(".int8.onnx")
        quantize_graph(path, target)
        return target

    return Passes(
        graphs.prompt, *(quantized(path) for path in (graphs.denoise, graphs.clean, graphs.recache))
    )
