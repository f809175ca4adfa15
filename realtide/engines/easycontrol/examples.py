"""A little of the work that an image bundle is for, to see what numbers its programs compute with (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from realtide.bundle import Bundle
from realtide.engines.easycontrol.config import Role, condition_bytes
from realtide.engines.easycontrol.engine import adapters, architecture, tokenizers
from realtide.engines.easycontrol.layout import PROGRAMS
from realtide.engines.easycontrol.parts import Parts
from realtide.engines.easycontrol.request import Held, Request
from realtide.engines.easycontrol.store import ConditionStore
from realtide.engines.easycontrol.types import Generate, Pixels8
from realtide.engines.easycontrol.worker import Worker
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.recording import shortened
from realtide.engines.runtime.weights import WeightFile

PROMPTS = ("a red heart", "a yellow face that smiles")


def run(
    bundle: Bundle, program_of: Callable[[str, Mapping[str, Array]], Runs], *, pictures: bool = False
) -> str:
    """Draw an image without a condition, one under each kind of condition, and one under all that may be.

    Args:
        bundle: whose images they are.
        program_of: runs a program, given its name and its state, of which these programs have none.
        pictures: decode each image too, and a preview of it.

    Returns:
        What was done; one clause.

    Raises:
        BundleError: the bundle lacks a tokenizer or a LoRA.
        ProgramError: a program cannot be run.
    """
    manifest, weights = bundle.manifest, WeightFile(bundle.weights)
    config, _, pooled = architecture(manifest.architecture)
    limits, sampler = manifest.limits, config.sampler
    most = int(limits["conditions"])
    held = [(Held(kind, _picture(config.conditions.size, config.conditions.role(kind))), 1.0)
            for kind in config.conditions.kinds]  # fmt: skip
    each = condition_bytes(config, 4)
    worker = Worker("examples")
    try:
        pieces, short = tokenizers(bundle, config, pooled)
        store = ConditionStore(max(most, 1) * each, each)
        programs = PROGRAMS.map(lambda name: program_of(name, {}))
        parts = Parts(config, programs, pieces, short, adapters(bundle, config, weights), store, worker)
        chosen = [[], *([one] for one in held if most), held[:most]]
        width, height = (int(side) for side in limits["size"])
        for number, conditions in enumerate(chosen):
            prompt = shortened(PROMPTS[number % len(PROMPTS)], pieces.count, pieces.limit)
            wanted = Generate("", prompt, width, height, sampler.steps, sampler.guidance, number)
            request = Request(parts, wanted, 0, conditions)
            while not request.ready:
                request.prepare(lambda *stage: None)
            while not request.done:
                clean = request.advance(parts.velocities([request.row()], request.grid)[0])
            if pictures:
                parts.preview(clean, request.grid)
                parts.decode(clean, request.grid)
            request.close()
    finally:
        worker.close()
    return f"{len(chosen)} images of {width}x{height}, all but the first under conditions"


def _picture(size: int, role: Role) -> Pixels8:
    """A circle: its outline in white on black where positions count, else a yellow disc on white."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    radius = np.hypot(x, y) / size
    if role == "spatial":
        outline = np.abs(radius - 0.35) < 1.5 / size
        return np.repeat(outline[..., None], 3, -1).astype(np.uint8) * np.uint8(255)
    return np.where(radius[..., None] < 0.35, np.array([250, 200, 40], np.uint8), np.uint8(255))
