"""LongLive's programs over TensorRT plans; caches, latents and frames stay on the device (ours).

Serving without TensorRT never imports this module.
"""

from __future__ import annotations

from torch import Tensor

from realtide.engines.longlive.caches import Cache
from realtide.engines.longlive.config import VideoConfig, cross_shapes
from realtide.engines.longlive.layout import DECODE, PASSES
from realtide.engines.longlive.programs import HalfPrograms, Stages, VideoPrograms
from realtide.engines.runtime.plan_program import PlanPrograms, zeros
from realtide.engines.runtime.program import Runs
from realtide.engines.runtime.resident_program import Bound
from realtide.engines.runtime.tensorrt import PlanOf
from realtide.engines.runtime.tensorrt_program import Scratch


class PassPlans:
    """The transformer's four plans, for sessions that one thread runs.

    Args:
        plan_of: by the names of `layout.PASSES`.
        config: shapes.
        scratch: see `PlanPrograms`.
        device: as PyTorch names it.

    Raises:
        ProgramError: there is no plan, or it does not load.
    """

    def __init__(self, plan_of: PlanOf, config: VideoConfig, scratch: Scratch, device: str) -> None:
        plans = PASSES.map(plan_of)
        made = plans.map(lambda plan: PlanPrograms(plan, scratch, device, kept=plan is plans.prompt))
        self._config, self._graph, self._device = config, plans.denoise.graph, device
        self._programs = made
        self._prompt = made.prompt.over({})

    def keys(self) -> dict[str, Tensor]:
        """A cache of one session."""
        return zeros(self._graph.state, self._device)

    def over(self, keys: dict[str, Tensor]) -> VideoPrograms:
        """Programs over a cache. All must be made before the first of them runs. Raises ProgramError."""
        crossed = cross_shapes(self._config)
        bound = Bound(zeros([spec for spec in self._graph.inputs if spec.name in crossed], self._device))
        return VideoPrograms(
            prompt=self._prompt,
            denoise=self._programs.denoise.over(keys, bound),
            clean=self._programs.clean.over(keys, bound),
            recache=self._programs.recache.over(keys, bound),
        )


class HalfPlans:
    """Plans of a half of the VAE, for streams that one thread runs; see `PassPlans`."""

    def __init__(self, plan_of: PlanOf, scratch: Scratch, device: str, stages: Stages[str] = DECODE) -> None:
        plans = stages.map(plan_of)
        self._graph, self._device = plans.first.graph, device
        self._programs = plans.map(lambda plan: PlanPrograms(plan, scratch, device))

    def features(self) -> dict[str, Tensor]:
        """Feature caches of one stream."""
        return zeros(self._graph.state, self._device)

    def over(self, features: dict[str, Tensor]) -> HalfPrograms:
        """Programs over feature caches. Raises ProgramError."""
        return self._programs.map(lambda programs: programs.over(features))


def caches(passes: PassPlans, halves: HalfPlans, count: int) -> list[Cache]:
    """`count` caches with their programs. Raises ProgramError."""
    made = []
    for _ in range(count):
        keys, features = passes.keys(), halves.features()
        made.append(Cache(passes.over(keys), keys, halves.over(features), features))
    return made


def text_program(plan_of: PlanOf, name: str, scratch: Scratch, device: str) -> Runs:
    """Ids [tokens] of one prompt to embeddings [tokens, dim]. Raises ProgramError."""
    return PlanPrograms(plan_of(name), scratch, device, graphs=False).over({})
