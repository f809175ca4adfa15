"""Plans of all graphs of a bundle, built into the plan cache (ours; extra ``trt`` or ``trt-rtx``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from realtide.bundle import Bundle, Precision
from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.plan_key import Gpu, PlanKey
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.tensorrt import BuildOptions, Progress, TimingCache
from realtide.engines.runtime.weights import WeightFile
from realtide.variants import engine_graphs, manifest_values


@dataclass(frozen=True, slots=True)
class Built:
    """What became of one program.

    Attributes:
        program: its name.
        subject: what the cache calls it.
        key: None if there is none, because the graph or its sizes are not usable.
        size: bytes of the plan; 0 if there is none.
        fresh: it was built now, not found.
        problem: why there is no plan; empty if there is one.
    """

    program: str
    subject: str
    key: PlanKey | None
    size: int
    fresh: bool
    problem: str


def subject(bundle: Bundle, program: str, precision: Precision) -> str:
    """What the plan cache calls a plan: ``longlive-emoji/denoise/float16``."""
    return f"{bundle.manifest.name}/{program}/{precision}"


def build_plans(
    bundle: Bundle,
    precision: Precision,
    graphs: Mapping[str, Path],
    cache: PlanCache,
    *,
    gpu: Gpu,
    max_batch: int,
    on_program: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_progress: Progress | None = None,
) -> list[Built]:
    """Build what the cache lacks. A program that cannot be built is told, and the others are built.

    Args:
        bundle: with the weights.
        precision: of `graphs`.
        graphs: graph files by program, for example of `variants.export_variant`.
        cache: where the plans go; a timing cache lies beside them.
        gpu: what `tensorrt.target` gives.
        max_batch: see the engines' `graphs.sizes`.
        on_program: told each program with its number and how many there are, before it is worked on.
        on_progress: told what TensorRT does; called from its threads.

    Raises:
        VariantError: the bundle's engine is unknown.
        PlanError: the cache cannot be used.
    """
    sizes = engine_graphs(bundle).sizes(manifest_values(bundle), max_batch)
    weights: Mapping[str, Array] = WeightFile(bundle.weights)
    name = f"timing.{gpu.capability}"
    timing = TimingCache(cache.read_timing(name))
    known = timing.data
    options = BuildOptions(gpu.capability, timing, on_progress)
    found = []
    for number, (program, path) in enumerate(graphs.items()):
        on_program(program, number, len(graphs))
        about, fresh, key = subject(bundle, program, precision), False, None

        def build(path: Path = path, program: str = program) -> bytes:
            nonlocal fresh
            fresh = True
            return tensorrt.build_engine(path, weights, sizes.get(program, {}), options)

        try:
            data = path.read_bytes()
            key = tensorrt.plan_key(data, weights, sizes.get(program, {}), precision, gpu)
            plan = cache.get(about, key, build)
            found.append(Built(program, about, key, len(plan), fresh, ""))
        except OSError as error:
            found.append(Built(program, about, key, 0, False, f"{path}: {error.strerror}"))
        except ProgramError as error:
            found.append(Built(program, about, key, 0, False, str(error)))
    if timing.data != known:
        cache.write_timing(name, timing.data)
    return found
