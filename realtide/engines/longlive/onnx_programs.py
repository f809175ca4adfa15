"""LongLive's programs over their ONNX graphs (ours). What serves on a CPU; imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from realtide.engines.longlive.programs import HalfPrograms, Passes, Stages, VideoPrograms
from realtide.engines.runtime.ort import OrtOptions, OrtProgram
from realtide.engines.runtime.program import Array, Program


def video_programs(
    graphs: Passes[Path],
    weights: Mapping[str, Array],
    cache: Mapping[str, Array],
    options: OrtOptions | None = None,
) -> VideoPrograms:
    """Programs of one session over its cache (`config.cache_shapes`), updated in place.

    Raises:
        ProgramError: a graph cannot be loaded, or lacks a weight.
    """
    return VideoPrograms(
        prompt=OrtProgram(graphs.prompt, weights, {}, options),
        denoise=OrtProgram(graphs.denoise, weights, cache, options),
        clean=OrtProgram(graphs.clean, weights, cache, options),
        recache=OrtProgram(graphs.recache, weights, cache, options),
    )


def half_programs(
    graphs: Stages[Path],
    weights: Mapping[str, Array],
    caches: Mapping[str, Array],
    options: OrtOptions | None = None,
) -> HalfPrograms:
    """Decoding or encoding programs of one stream over its feature caches. Raises ProgramError."""
    return HalfPrograms(
        first=OrtProgram(graphs.first, weights, caches, options),
        later=OrtProgram(graphs.later, weights, caches, options),
    )


def text_program(graph: Path, weights: Mapping[str, Array], options: OrtOptions | None = None) -> Program:
    """Ids [tokens] of one prompt to embeddings [tokens, dim]. Raises ProgramError."""
    return OrtProgram(graph, weights, {}, options)
