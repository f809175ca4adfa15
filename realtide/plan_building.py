"""Plans of a bundle's graphs: from the plan cache, or built into it (ours; extra ``trt`` or ``trt-rtx``)."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from realtide.bundle import Bundle, BundleError, Precision
from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.plan_key import ANY, Gpu, PlanKey
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.quantize import FLOAT8_CAPABILITY
from realtide.engines.runtime.tensorrt import BuildOptions, Plan, Progress, TimingCache
from realtide.engines.runtime.weights import WeightFile
from realtide.variants import VariantError, engine_graphs, export_variant, manifest_values

log = logging.getLogger(__name__)

TOLD_EVERY = 10.0
"""Seconds between two lines about a build."""


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

    Programs that are for processors only (`HOST_ONLY` of the engine's graphs) are passed over.

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
        ProgramError: the GPU does not compute in this precision.
    """
    source = _Source(bundle, precision, cache, gpu, max_batch, on_progress)
    found = []
    host = engine_graphs(bundle).HOST_ONLY
    graphs = {program: path for program, path in graphs.items() if program not in host}
    for number, (program, path) in enumerate(graphs.items()):
        on_program(program, number, len(graphs))
        about, key, builds = subject(bundle, program, precision), None, source.builds
        try:
            data = path.read_bytes()
            key = source.key(program, data)
            plan = source.get(program, data, key)
            found.append(Built(program, about, key, len(plan), source.builds > builds, ""))
        except OSError as error:
            found.append(Built(program, about, key, 0, False, f"{path}: {error.strerror}"))
        except ProgramError as error:
            found.append(Built(program, about, key, 0, False, str(error)))
    source.keep_timing()
    return found


class BundlePlans:
    """Plans that an engine is served from, by program.

    Args:
        bundle: with the weights.
        precision: what is served: graphs that the bundle has in it, or its float32 graphs rewritten.
        cache: where plans are.
        gpu: what `tensorrt.target` gives.
        max_batch: see the engines' `graphs.sizes`; plans fit the one that they were built with.
        build: build what the cache lacks, which takes minutes, and say so in the log; else refuse it.

    Raises:
        ProgramError: the GPU does not compute in this precision.
    """

    def __init__(
        self, bundle: Bundle, precision: Precision, cache: PlanCache, gpu: Gpu, max_batch: int, build: bool
    ) -> None:
        self._bundle, self._precision, self._build = bundle, precision, build
        self._source = _Source(bundle, precision, cache, gpu, max_batch, _Told(bundle.manifest.name))
        self._rewritten: dict[str, bytes] = {}

    def __call__(self, program: str) -> Plan:
        """The plan of a program; see `tensorrt.PlanOf`.

        Raises:
            ProgramError: there is none that fits and none may be built, or the graph cannot be had.
        """
        data = self._graph(program)
        plan = self._source.get(program, data, self._source.key(program, data), build=self._build)
        self._source.keep_timing()
        return Plan(subject(self._bundle, program, self._precision), plan, read_graph(data))

    def _graph(self, program: str) -> bytes:
        bundle, precision = self._bundle, self._precision
        try:
            if precision == "float32" or precision in bundle.manifest.programs.get(program, {}):
                return bundle.graph(program, precision).read_bytes()
            if program not in self._rewritten:
                bundle.graph(program, "float32")  # refuses programs that it does not have
                with tempfile.TemporaryDirectory(prefix="realtide-") as folder:
                    found = export_variant(bundle, precision, Path(folder))
                    self._rewritten = {name: path.read_bytes() for name, (path, _) in found.items()}
            return self._rewritten[program]
        except (BundleError, VariantError, OSError, ImportError) as error:
            raise ProgramError(f"{subject(bundle, program, precision)}: {error}") from error


class _Source:
    """Keys and plans of a bundle's graphs."""

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        cache: PlanCache,
        gpu: Gpu,
        max_batch: int,
        on_progress: Progress | None,
    ) -> None:
        self._bundle, self._precision, self._cache, self._gpu = bundle, precision, cache, gpu
        if precision == "float8" and gpu.capability != ANY:
            least = ".".join(map(str, FLOAT8_CAPABILITY))
            if tuple(map(int, gpu.capability.split("."))) < FLOAT8_CAPABILITY:
                raise ProgramError(
                    f"precision: fp8 needs a GPU of compute capability {least} or more, {gpu.name} has"
                    f" {gpu.capability}"
                )
        self._sizes = engine_graphs(bundle).sizes(manifest_values(bundle), max_batch)
        self._weights: Mapping[str, Array] = WeightFile(bundle.weights)
        self._timing_name = f"timing.{gpu.capability}"
        self._timing = TimingCache(cache.read_timing(self._timing_name))
        self._known = self._timing.data
        self._options = BuildOptions(gpu.capability, self._timing, on_progress)
        self.builds = 0

    def key(self, program: str, graph: bytes) -> PlanKey:
        """Raises ProgramError: the graph or its sizes are not usable."""
        sizes = self._sizes.get(program, {})
        return tensorrt.plan_key(graph, self._weights, sizes, self._precision, self._gpu)

    def get(self, program: str, graph: bytes, key: PlanKey, *, build: bool = True) -> bytes:
        """The plan of a key. Raises ProgramError, PlanError among them."""

        def made() -> bytes:
            self.builds += 1
            sizes = self._sizes.get(program, {})
            return tensorrt.build_engine(graph, self._weights, sizes, self._options, label=about)

        about = subject(self._bundle, program, self._precision)
        return self._cache.get(about, key, made if build else None)

    def keep_timing(self) -> None:
        """Write what was measured of kernels. Raises PlanError."""
        if self._timing.data != self._known:
            self._cache.write_timing(self._timing_name, self._timing.data)
            self._known = self._timing.data


class _Told:
    """Progress of a build as lines of the log, not too many."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= TOLD_EVERY:
            self._last = time.monotonic()
            log.info("%s: TensorRT is at %s, %d of %d", self._name, what, done, total)
