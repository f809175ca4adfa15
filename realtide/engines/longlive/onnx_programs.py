"""LongLive's programs over their ONNX graphs (ours). What serves on a CPU; imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from realtide.engines.longlive.programs import Passes, Stages
from realtide.engines.runtime.ort import OrtOptions, OrtProgram
from realtide.engines.runtime.program import Array, Program


def video_programs(
    graphs: Passes[Path],
    weights: Mapping[str, Array],
    cache: Mapping[str, Array],
    options: OrtOptions | None = None,
) -> Passes[OrtProgram]:
    """Programs of one session over its cache (`config.cache_shapes`), updated in place.

    Raises:
        ProgramError: a graph cannot be loaded, or lacks a weight.
    """
    return Passes(
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
) -> Stages[OrtProgram]:
    """Decoding or encoding programs of one stream over its feature caches. Raises ProgramError."""
    return graphs.map(lambda graph: OrtProgram(graph, weights, caches, options))


def video_over(programs: Passes[OrtProgram], cache: Mapping[str, Array]) -> Passes[OrtProgram]:
    """The same loaded graphs over another session's cache: weights are in memory once."""
    return Passes(
        prompt=programs.prompt,
        denoise=programs.denoise.over(cache),
        clean=programs.clean.over(cache),
        recache=programs.recache.over(cache),
    )


def half_over(programs: Stages[OrtProgram], caches: Mapping[str, Array]) -> Stages[OrtProgram]:
    """The same loaded graphs over another stream's feature caches."""
    return programs.map(lambda program: program.over(caches))


def text_program(graph: Path, weights: Mapping[str, Array], options: OrtOptions | None = None) -> Program:
    """Ids [tokens] of one prompt to embeddings [tokens, dim]. Raises ProgramError."""
    return OrtProgram(graph, weights, {}, options)
