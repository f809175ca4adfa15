"""The condition branch alone, against everything at once under EasyControl's mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.easycontrol import rotary, schedule
from realtide.engines.easycontrol.config import Role, lora_shapes
from realtide.engines.easycontrol.steps import Denoise, Remember, pairs
from realtide.engines.easycontrol.transformer import (
    DoubleBlock,
    FluxTransformer,
    Lora,
    SingleBlock,
    adapted,
    attend,
)
from tests.engines.easycontrol.conftest import CONFIG, MODEL, random, transformer

GRID, OWN = (3, 5), (4, 4)
TABLE = torch.from_numpy(rotary.image_table(MODEL, GRID))


def sinusoids(sigma: float) -> Tensor:
    return torch.from_numpy(schedule.sinusoid([[sigma, 3.5]], MODEL.freq_dim))


def condition(seed: int) -> tuple[Tensor, Tensor, list[Lora]]:
    """Latents, table and LoRA of a condition: subjects where the seed is odd."""
    role: Role = "subject" if seed % 2 else "spatial"
    table = torch.from_numpy(rotary.table(MODEL, rotary.condition_positions(role, OWN, GRID, 16)))
    shapes = lora_shapes(MODEL, 3).values()
    loras = pairs([torch.from_numpy(0.3 * random(seed + n, *shape)) for n, shape in enumerate(shapes)])
    return torch.from_numpy(random(seed, 1, 16, MODEL.channels)), table, loras


LATENTS = torch.from_numpy(random(7, 1, 15, MODEL.channels))
POOLED = torch.from_numpy(random(8, 1, MODEL.pooled_dim))
TEXT = torch.from_numpy(random(9, 1, 5, MODEL.text_dim))


def cached(
    model: FluxTransformer, sigma: float, conditions: list[tuple[Tensor, Tensor, list[Lora]]]
) -> Tensor:
    """A step over caches that were made once."""
    rest = [model.condition(x, sinusoids(0.0), POOLED, table, loras) for x, table, loras in conditions]
    joined = (
        []
        if not rest
        else [
            (torch.cat([c[block][0] for c in rest], 2), torch.cat([c[block][1] for c in rest], 2))
            for block in range(MODEL.blocks)
        ]
    )
    made: Tensor = model(LATENTS, sinusoids(sigma), POOLED, TEXT, TABLE, joined or None)
    return made


def together(
    model: FluxTransformer, sigma: float, conditions: list[tuple[Tensor, Tensor, list[Lora]]]
) -> Tensor:
    """All tokens through every block in one sequence, under a mask: written anew from the paper."""
    vector, still = (model.time_text_embed(sinusoids(s), POOLED) for s in (sigma, 0.0))
    image, text = model.x_embedder(LATENTS), model.context_embedder(TEXT)
    tokens = [model.x_embedder(x) for x, _, _ in conditions]
    own = 20
    count = own + 16 * len(conditions)
    mask = torch.zeros(count, count, dtype=torch.bool)
    mask[:own] = True
    for number in range(len(conditions)):
        mask[own + 16 * number : own + 16 * (number + 1), own + 16 * number : own + 16 * (number + 1)] = True

    def mixed(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        queries, keys, values = (torch.cat([part[n] for part in parts], 2) for n in range(3))
        scores = queries @ keys.transpose(2, 3) * MODEL.head_dim**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out: Tensor = (weights @ values).transpose(1, 2).flatten(2)
        return out

    def shifted(x: Tensor, parts: list[Tensor], first: int) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=MODEL.eps) * (1 + parts[first + 1]) + parts[first]

    index = 0
    for block in model.transformer_blocks:
        assert isinstance(block, DoubleBlock)
        of_image, of_text, of_condition = block.norm1(vector), block.norm1_context(vector), block.norm1(still)
        loras = [c[2][index] for c in conditions]
        parts = [block.attn.text(shifted(text, of_text, 0), TABLE[:5])]
        parts += [block.attn.image(shifted(image, of_image, 0), TABLE[5:])]
        parts += [
            block.attn.image(shifted(x, of_condition, 0), c[1], lora)
            for x, c, lora in zip(tokens, conditions, loras, strict=True)
        ]
        out = mixed(parts)
        text = text + of_text[2] * block.attn.to_add_out(out[:, :5])
        text = text + of_text[5] * block.ff_context(shifted(text, of_text, 3))
        image = image + of_image[2] * block.attn.to_out["0"](out[:, 5:own])
        image = image + of_image[5] * block.ff(shifted(image, of_image, 3))
        for number, lora in enumerate(loras):
            at = own + 16 * number
            o = block.attn.to_out["0"](out[:, at : at + 16])
            x = tokens[number] + of_condition[2] * adapted(o, o, lora, 3)
            tokens[number] = x + of_condition[5] * block.ff(shifted(x, of_condition, 3))
        index += 1
    whole = torch.cat([text, image], 1)
    for block in model.single_transformer_blocks:
        assert isinstance(block, SingleBlock)
        of_image, of_condition = block.norm(vector), block.norm(still)
        loras = [c[2][index] for c in conditions]
        normed = [shifted(whole, of_image, 0), *(shifted(x, of_condition, 0) for x in tokens)]
        parts = [block.attn.image(normed[0], TABLE)]
        parts += [
            block.attn.image(x, c[1], lora) for x, c, lora in zip(normed[1:], conditions, loras, strict=True)
        ]
        pieces = torch.split(mixed(parts), [own, *[16] * len(conditions)], 1)
        made = [
            block.proj_out(torch.cat([piece, F.gelu(block.proj_mlp(x), approximate="tanh")], -1))
            for piece, x in zip(pieces, normed, strict=True)
        ]
        whole = whole + of_image[2] * made[0]
        tokens = [x + of_condition[2] * m for x, m in zip(tokens, made[1:], strict=True)]
        index += 1
    scale, shift = model.norm_out(vector)
    out = F.layer_norm(whole[:, 5:], whole.shape[-1:], eps=MODEL.eps) * (1 + scale) + shift
    result: Tensor = model.proj_out(out)
    return result


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_cached_is_what_a_whole_pass_under_the_mask_gives(count: int, sigma: float) -> None:
    model = transformer()
    conditions = [condition(seed) for seed in (11, 12, 13)[:count]]
    torch.testing.assert_close(
        cached(model, sigma, conditions), together(model, sigma, conditions), atol=2e-5, rtol=1e-4
    )


def test_everything_of_a_condition_matters() -> None:
    model = transformer()
    x, table, loras = condition(11)
    plain = cached(model, 0.4, [])
    base = cached(model, 0.4, [(x, table, loras)])
    assert (base - plain).abs().max() > 1e-2
    moved = table[torch.arange(15, -1, -1)]
    for change in ((x + 1, table, loras), (x, moved, loras), (x, table, [(d, 0 * u) for d, u in loras])):
        assert (cached(model, 0.4, [change]) - base).abs().max() > 1e-4


def test_the_order_of_conditions_does_not_matter() -> None:
    model = transformer()
    first, second = condition(11), condition(12)
    torch.testing.assert_close(
        cached(model, 0.4, [first, second]), cached(model, 0.4, [second, first]), atol=1e-5, rtol=1e-4
    )


def test_programs_are_the_model() -> None:
    model = transformer()
    x, table, loras = condition(12)
    flat = [part for lora in loras for part in lora]
    cache = Remember(model)(x[0], sinusoids(0.0)[0], POOLED[0], table, *flat)
    made = Denoise(model)(LATENTS, sinusoids(0.4), POOLED, TEXT, TABLE, *(part[None] for part in cache))
    torch.testing.assert_close(made, cached(model, 0.4, [condition(12)]))


def test_a_batch_is_each_alone() -> None:
    model = transformer()
    one, two = cached(model, 0.4, [condition(11)]), cached(model, 0.9, [condition(12)])
    rest = [model.condition(c[0], sinusoids(0.0), POOLED, c[1], c[2]) for c in (condition(11), condition(12))]
    joined = [tuple(torch.cat([r[b][n] for r in rest]) for n in range(2)) for b in range(MODEL.blocks)]
    both = model(
        LATENTS.repeat(2, 1, 1),
        torch.cat([sinusoids(0.4), sinusoids(0.9)]),
        POOLED.repeat(2, 1),
        TEXT.repeat(2, 1, 1),
        TABLE,
        [(pair[0], pair[1]) for pair in joined],
    )
    torch.testing.assert_close(both, torch.cat([one, two]), atol=1e-5, rtol=1e-4)


def test_models_without_guidance_take_one_number() -> None:
    from dataclasses import replace

    config = replace(MODEL, guidance=False)
    assert not any("guidance" in name for name in FluxTransformer(config).state_dict())
    model = transformer(config)
    out = model(LATENTS, sinusoids(0.4)[:, :1], POOLED, TEXT, TABLE)
    assert out.shape == LATENTS.shape


def test_attention_is_scaled() -> None:
    q, k, v = (torch.from_numpy(random(n, 1, 2, 3, 4)) for n in range(3))
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v), want)


def test_positions_of_conditions() -> None:
    spatial = rotary.condition_positions("spatial", (2, 2), (4, 6), 64)
    np.testing.assert_array_equal(spatial[:, 1:], [[0, 0], [0, 3], [2, 0], [2, 3]])
    subject = rotary.condition_positions("subject", (2, 2), (4, 6), 64)
    np.testing.assert_array_equal(subject[:, 1:], [[64, 0], [64, 1], [65, 0], [65, 1]])
    table = rotary.image_table(MODEL, GRID)
    assert table.shape == (5 + 15, 6, 2)
    np.testing.assert_array_equal(table[:5], np.tile([1.0, 0.0], (5, 6, 1)))
    assert CONFIG.condition_grid == OWN


def test_packing_keeps_every_pixel() -> None:
    from realtide.engines.easycontrol.packing import pack, unpack

    latents = random(3, 4, 6, 10)
    tokens = pack(latents, 2)
    assert tokens.shape == (15, 16)
    np.testing.assert_array_equal(tokens[6].reshape(4, 2, 2), latents[:, 2:4, 2:4])
    np.testing.assert_array_equal(unpack(tokens, (3, 5), 2), latents)


def test_the_schedule_shifts_with_the_size() -> None:
    small, large = (schedule.sigmas(CONFIG.sampler, 4, tokens) for tokens in (4, 64))
    assert small[0] == large[0] == 1.0
    assert small[-1] == large[-1] == 0.0
    assert (large[1:-1] > small[1:-1]).all()
    np.testing.assert_allclose(small[2], np.e**0.5 / (np.e**0.5 + 1), rtol=1e-6)
    x, v = random(1, 3), random(2, 3)
    np.testing.assert_allclose(schedule.step(x, v, 0.5, 0.0), schedule.clean(x, v, 0.5), rtol=1e-6)
