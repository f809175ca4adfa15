"""Shapes from the manifest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    PooledConfig,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    cache_names,
    condition_bytes,
    lora_shapes,
)
from realtide.engines.runtime.section import Section
from tests.engines.easycontrol.conftest import CONFIG, MODEL

FULL = ImageConfig(
    TransformerConfig(),
    ConditionConfig(spatial=("canny",), subject=("subject",)),
    SamplerConfig(),
    VaeConfig(),
)


def test_the_defaults_are_flux_dev() -> None:
    model = FULL.transformer
    assert (model.dim, model.blocks, model.latent, model.scalars) == (3072, 57, 16, 2)
    assert (FULL.token_pixels, FULL.condition_grid, FULL.condition_tokens) == (16, (32, 32), 1024)
    assert FULL.grid(1024, 768) == (48, 64)
    assert condition_bytes(FULL, 2) == 57 * 2 * 1024 * 3072 * 2


@pytest.mark.parametrize(
    "section", [FULL.transformer, FULL.conditions, FULL.sampler, FULL.vae, TextConfig(), PooledConfig()]
)
def test_sections_survive_the_manifest(section: Section) -> None:
    assert type(section).from_dict(section.to_dict()) == section
    with pytest.raises(ValueError, match=f"{section.section} has no field 'colour'"):
        type(section).from_dict(section.to_dict() | {"colour": 1})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (TransformerConfig(), {"heads": 0}, "transformer.heads must be a whole number"),
        (TransformerConfig(), {"axes": (16, 56, 58)}, r"transformer.axes must be three even .* \(128\)"),
        (TransformerConfig(), {"channels": 63}, r"transformer.channels \(63\) must be a multiple"),
        (TransformerConfig(), {"freq_dim": 255}, "transformer.freq_dim must be even"),
        (TransformerConfig(), {"guidance": 1}, "transformer.guidance must be true or false"),
        (TransformerConfig(), {"eps": 0.0}, "transformer.eps must be positive"),
        (ConditionConfig(), {"offset": -1}, "conditions.offset"),
        (ConditionConfig(), {"spatial": ("line art",)}, "'line art' is no name of a kind"),
        (ConditionConfig(), {"spatial": ("a",), "subject": ("a",)}, "a kind is named twice"),
        (SamplerConfig(), {"max_tokens": 256}, "must differ"),
        (SamplerConfig(), {"guidance": -1.0}, "sampler.guidance must not be negative"),
        (VaeConfig(), {"widths": (100,)}, "vae.widths must be multiples of vae.groups"),
        (VaeConfig(), {"scaling": 0.0}, "vae.scaling must be positive"),
        (TextConfig(), {"buckets": 30}, "text.buckets must be a multiple of 4"),
        (PooledConfig(), {"heads": 5}, "pooled.dim .* must be a multiple"),
        (PooledConfig(), {"end": 49408}, "must be ids of the vocabulary"),
    ],
)
def test_what_makes_no_model_is_refused(section: Section, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(section, **changes)  # type: ignore[type-var]


def test_sections_are_checked_against_each_other() -> None:
    with pytest.raises(ValueError, match=r"are 16 latent channels, vae.latent is 4"):
        replace(FULL, vae=VaeConfig(latent=4))
    with pytest.raises(ValueError, match=r"conditions.size \(500\) must be a multiple .* \(16\)"):
        replace(FULL, conditions=ConditionConfig(size=500))
    with pytest.raises(ValueError, match=r"preview must be in 1..8, got 9"):
        replace(FULL, preview=9)


def test_sizes_are_whole_tokens() -> None:
    assert CONFIG.grid(24, 40) == (5, 3)
    for size in ((0, 8), (8, 0), (12, 8), (8, 12)):
        with pytest.raises(ValueError, match="is no multiple of 8"):
            CONFIG.grid(*size)


def test_roles_of_kinds() -> None:
    assert [CONFIG.conditions.role(kind) for kind in CONFIG.conditions.kinds] == [
        "spatial",
        "spatial",
        "subject",
    ]
    with pytest.raises(KeyError):
        CONFIG.conditions.role("pose")


def test_names_of_caches_and_loras() -> None:
    assert cache_names(MODEL)[:3] == ("key_0", "value_0", "key_1")
    shapes = lora_shapes(MODEL, 3)
    assert (shapes["down_0"], shapes["up_3"]) == ((4, 3, 24), (3, 24, 3))
    assert len(shapes) == 2 * MODEL.blocks
