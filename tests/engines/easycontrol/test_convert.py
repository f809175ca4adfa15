"""Public checkpoints, in every layout, become a bundle; all names and shapes are held."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from realtide.bundle import load_bundle
from realtide.engines.easycontrol import convert, convert_names, loras
from realtide.engines.easycontrol.config import TransformerConfig
from realtide.engines.easycontrol.convert import Card, Limits, Sources
from realtide.engines.easycontrol.engine import load
from realtide.engines.runtime.checkpoint_files import ConvertError, Stored, read_checkpoint
from realtide.engines.runtime.weights import WeightFile
from tests.engines.easycontrol.conftest import GOLDEN
from tests.engines.easycontrol.small import POOLED, TOKENIZER, modules

NAMES = json.loads((Path(__file__).parents[2] / "data" / "easycontrol" / "names.json").read_text())
CARD = Card("small", "1.0.0", "Random weights.", "Apache-2.0", "random")
Weights = dict[str, Tensor]
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
OUTER = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder": "time_in", "time_text_embed.guidance_embedder": "guidance_in",
    "time_text_embed.text_embedder": "vector_in",
}  # fmt: skip


def golden(name: str) -> Weights:
    return {key: torch.from_numpy(value) for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


def single_file(weights: Mapping[str, Tensor]) -> Weights:
    """The transformer as the original single file has it; written from its names, not from the reader."""
    found: Weights = {}
    blocks = {name.split(".")[1] for name in weights if name.startswith("transformer_blocks")}
    for block in blocks:
        own = {n.removeprefix(f"transformer_blocks.{block}."): v for n, v in weights.items()
               if n.startswith(f"transformer_blocks.{block}.")}  # fmt: skip
        for last in ("weight", "bias"):
            for side, parts in (("img", "to_q to_k to_v"), ("txt", "add_q_proj add_k_proj add_v_proj")):
                stack = [own[f"attn.{part}.{last}"] for part in parts.split()]
                found[f"double_blocks.{block}.{side}_attn.qkv.{last}"] = torch.cat(stack)
            for ours, theirs in DOUBLE.items():
                if f"{ours}.{last}" in own:
                    name = f"double_blocks.{block}.{theirs}.{last}"
                    found[name.replace("norm.weight", "norm.scale")] = own[f"{ours}.{last}"]
    for block in {name.split(".")[1] for name in weights if name.startswith("single_transformer_blocks")}:
        before = f"single_transformer_blocks.{block}."
        for last in ("weight", "bias"):
            stacked = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            stack = [weights[f"{before}{part}.{last}"] for part in stacked]
            found[f"single_blocks.{block}.linear1.{last}"] = torch.cat(stack)
            found[f"single_blocks.{block}.linear2.{last}"] = weights[f"{before}proj_out.{last}"]
            found[f"single_blocks.{block}.modulation.lin.{last}"] = weights[f"{before}norm.linear.{last}"]
        for ours, theirs in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            found[f"single_blocks.{block}.norm.{theirs}.scale"] = weights[f"{before}attn.{ours}.weight"]
    for name, value in weights.items():
        for ours, theirs in OUTER.items():
            if name.startswith(f"{ours}."):
                renamed = (
                    name.replace(ours, theirs, 1)
                    .replace("linear_1", "in_layer")
                    .replace("linear_2", "out_layer")
                )
                found[renamed] = value
    for last in ("weight", "bias"):
        scale, shift = weights[f"norm_out.linear.{last}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{last}"] = torch.cat([shift, scale])
    return found


def original_vae(weights: Mapping[str, Tensor], levels: int) -> Weights:
    """The VAE as the original single file has it."""

    def renamed(name: str) -> str:
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
        name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
        return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    def shaped(name: str, value: Tensor) -> Tensor:
        return value[..., None, None] if "attentions" in name and value.ndim == 2 else value

    return {renamed(name): shaped(name, value) for name, value in weights.items()}


def saved(path: Path, weights: Mapping[str, Tensor]) -> Path:
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)
    return path


def values(parts: Mapping[str, Stored]) -> dict[str, Any]:
    return {name: stored.read().numpy() for name, stored in parts.items()}


def equal(have: Mapping[str, Stored], want: Mapping[str, Tensor]) -> None:
    assert set(have) == set(want)
    for name, array in values(have).items():
        np.testing.assert_array_equal(array, want[name].numpy(), err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_both_layouts_of_the_transformer_are_one(tmp_path: Path, prefix: str) -> None:
    weights = golden("weights_seed3")
    settings = {"axes_dims_rope": [8, 12, 12]}
    config, parts = convert_names.transformer(
        read_checkpoint(GOLDEN / "weights_seed3.safetensors"), settings, 12
    )
    assert config == TransformerConfig(
        double_blocks=2, single_blocks=3, heads=4, head_dim=32, channels=64, text_dim=48, text_tokens=12,
        pooled_dim=40, axes=(8, 12, 12),
    )  # fmt: skip
    equal(parts, weights)
    single = {prefix + name: value for name, value in single_file(weights).items()}
    file = read_checkpoint(saved(tmp_path / "flux.safetensors", single))
    again, stacked = convert_names.transformer(file, settings, 12)
    assert again == config
    equal(stacked, weights)


def test_both_layouts_of_the_vae_are_one(tmp_path: Path) -> None:
    weights = golden("flux_vae_weights_seed51")
    settings = {"norm_num_groups": 4, "scaling_factor": 0.36, "shift_factor": 0.12}
    path = GOLDEN / "flux_vae_weights_seed51.safetensors"
    config, parts = convert_names.vae(read_checkpoint(path), settings)
    assert (config.widths, config.layers, config.latent, config.scaling) == ((8, 16, 16), 1, 4, 0.36)
    equal(parts, weights)
    file = read_checkpoint(saved(tmp_path / "ae.safetensors", original_vae(weights, 3)))
    again, renamed = convert_names.vae(file, settings)
    assert again == config
    equal(renamed, weights)


def test_text_encoders() -> None:
    t5 = read_checkpoint(GOLDEN / "t5_weights_seed52.safetensors")
    config, parts = convert_names.text(t5, {"relative_attention_max_distance": 16})
    assert (config.vocab, config.dim, config.heads, config.head_dim, config.layers) == (60, 24, 3, 8, 2)
    equal(parts, golden("t5_weights_seed52"))
    tied = dict(t5) | {"encoder.embed_tokens.weight": t5["shared.weight"]}
    assert set(convert_names.text(tied, {})[1]) == set(t5)
    clip = read_checkpoint(GOLDEN / "clip_weights_seed52.safetensors")
    pooled, states = convert_names.pooled(clip, {"num_attention_heads": 3})
    assert (pooled.tokens, pooled.heads, pooled.start, pooled.end, pooled.quick) == (12, 3, 58, 59, True)
    equal(states, golden("clip_weights_seed52"))
    short = {name.removeprefix("text_model."): stored for name, stored in clip.items()}
    assert set(convert_names.pooled(short, {"num_attention_heads": 3})[1]) == set(clip)


def shaped(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Names and shapes; no values."""

    def read() -> Tensor:
        raise AssertionError("shapes are all that is looked at")

    return {name: Stored(name, Path("file"), tuple(v.shape), read) for name, v in tensors.items()}


def listed(part: str) -> dict[str, Stored]:
    """What diffusers or transformers gives at full size."""
    return shaped({name: torch.empty(*shape, device="meta") for name, shape in NAMES[part].items()})


def test_full_size_is_what_the_libraries_write() -> None:
    config, parts = convert_names.transformer(listed("transformer"), {}, 512)
    assert config == TransformerConfig()
    assert sum(int(np.prod(stored.shape)) for stored in parts.values()) == 11_901_408_320
    assert set(convert_names.vae(listed("vae"), {})[1]) == set(NAMES["vae"])
    assert convert_names.vae(listed("vae"), {})[0].widths == (128, 256, 512, 512)
    text, words = convert_names.text(listed("text"), {})
    assert (text.dim, text.layers, text.heads, text.buckets, len(words)) == (
        4096,
        24,
        64,
        32,
        len(NAMES["text"]),
    )
    pooled, states = convert_names.pooled(listed("pooled"), {})
    assert (pooled.dim, pooled.heads, pooled.start, pooled.end) == (768, 12, 49406, 49407)
    assert len(states) == len(NAMES["pooled"])


def test_full_size_in_the_original_layout() -> None:
    meta = {name: torch.empty(*shape, device="meta") for name, shape in NAMES["transformer"].items()}
    file = shaped(single_file(meta))
    assert convert_names.transformer(file, {}, 512)[0] == TransformerConfig()
    vae = {name: torch.empty(*shape, device="meta") for name, shape in NAMES["vae"].items()}
    file = shaped(original_vae(vae, 4))
    assert convert_names.vae(file, {})[0].layers == 2


def changed(parts: dict[str, Stored], change: Callable[[dict[str, Stored]], object]) -> dict[str, Stored]:
    copy = dict(parts)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: p.pop("proj_out.bias"), r"lacks 'proj_out\.bias'"),
        (lambda p: p.update(extra=p["proj_out.bias"]), r"has 'proj_out\.bias', which is unknown"),
        (lambda p: p.update({"proj_out.weight": p["proj_out.bias"]}), r"is \[64\], must be \[64, 3072\]"),
        (lambda p: p.pop("x_embedder.weight"), "lacks 'x_embedder.weight': not a transformer of FLUX"),
    ],
)
def test_every_tensor_is_accounted_for(change: Callable[[dict[str, Stored]], object], problem: str) -> None:
    with pytest.raises(ConvertError, match=problem):
        convert_names.transformer(changed(listed("transformer"), change), {}, 512)


def test_loras_are_held_and_filled_up() -> None:
    config, _ = convert_names.transformer(
        read_checkpoint(GOLDEN / "weights_seed3.safetensors"), {"axes_dims_rope": [8, 12, 12]}, 12
    )
    found = read_checkpoint(GOLDEN / "lora_seed3_0.safetensors")
    rank, parts = convert_names.adapter(found, config, "canny")
    assert rank == 8
    equal(parts, golden("lora_seed3_0"))
    renumbered = {name.replace("_loras.0.", "_loras.3."): stored for name, stored in found.items()}
    assert set(convert_names.adapter(renumbered, config, "canny")[1]) == set(parts)
    wide = convert_names.widened(parts, 11)
    first = next(name for name in wide if ".down." in name)
    assert wide[first].shape == wide[first].read().shape == (11, 128)
    plain, grown = (loras.stacked(config, values(p), 0.7) for p in (parts, wide))
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    for n in range(3):
        want, have = (x @ s["down_0"][n].T @ s["up_0"][n].T for s in (plain, grown))
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConvertError, match="must be that of one condition"):
        convert_names.adapter(found | renumbered, config, "canny")
    last = "single_transformer_blocks.1.attn.processor.q_loras.0.up.weight"
    with pytest.raises(ConvertError, match=re.escape(f"lacks {last!r}")):
        convert_names.adapter(changed(dict(found), lambda p: p.pop(last)), config, "canny")


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A small model in diffusers' layout, with LoRAs of two ranks beside it."""
    root, made = tmp_path / "flux", modules()
    for name, part in (("transformer", made.transformer), ("vae", made.vae), ("text_encoder_2", made.text),
                       ("text_encoder", made.pooled)):  # fmt: skip
        (root / name).mkdir(parents=True)
        saved(root / name / "model.safetensors", part.state_dict())
    settings = {
        "transformer": {"axes_dims_rope": [4, 4, 4]},
        "vae": {"norm_num_groups": 4, "scaling_factor": 0.7, "shift_factor": 0.2},
        "text_encoder_2": {"relative_attention_max_distance": 8},
        "text_encoder": {"num_attention_heads": 2},
    }
    for name, told in settings.items():
        (root / name / "config.json").write_text(json.dumps(told))
    (root / "tokenizer_2").mkdir()
    shutil.copy(TOKENIZER, root / "tokenizer_2" / "spiece.model")
    (root / "tokenizer").mkdir()
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "fr", "fro", "frog</w>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 141, "<|endoftext|>": 142}
    (root / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\nf r\nfr o\nfro g</w>\n")
    config = made.transformer.config
    for kind, rank in (("canny", 3), ("subject", 2)):
        weights = {}
        for _, _, name in loras.names(config):
            weights[f"{name}.down.weight"] = torch.randn(rank, config.dim)
            weights[f"{name}.up.weight"] = torch.randn(config.dim, rank)
        saved(root / f"{kind}.safetensors", weights)
    return root


def sources(flux: Path) -> Sources:
    return Sources(
        **convert.find(flux),
        loras={
            "canny": (flux / "canny.safetensors", "spatial"),
            "subject": (flux / "subject.safetensors", "subject"),
        },
    )


def test_a_bundle_is_made_and_serves(flux: Path, tmp_path: Path) -> None:
    model = convert.read(sources(flux), text_tokens=24, condition_size=32)
    assert model.config.conditions.rank == 3
    limits = Limits((32, 32), (16, 64), 4096, 30, 2)
    done = convert.write(model, tmp_path / "bundle", CARD, limits, precision="float32")
    assert done["kinds"] == ["canny", "subject"]
    assert done["parameters"]["transformer"] == sum(p.numel() for p in modules().transformer.parameters())
    bundle = load_bundle(tmp_path / "bundle")
    weights = WeightFile(bundle.weights)
    np.testing.assert_array_equal(
        weights["vae.decoder.conv_in.weight"], modules().vae.decoder.conv_in.weight.numpy()
    )
    assert weights["preview.weight"].any()
    engine = load(bundle, slots=1, backend="torch")
    assert engine.info.kinds == {"canny": "spatial", "subject": "subject"}
    ids = engine._parts._pooled.encode("Frog  ab")
    assert list(ids[:5]) == [141, 54, 0, 27, 142]  # start, frog, a, b at a word's end
    assert POOLED.tokens == len(ids)
    engine.close()
    with pytest.raises(ConvertError, match="exists already"):
        convert.write(model, tmp_path / "bundle", CARD)


def test_parts_that_do_not_fit_leave_nothing(flux: Path, tmp_path: Path) -> None:
    (flux / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ConvertError, match=r"has neither tokenizer\.json nor vocab\.json"):
        convert.read(sources(flux), text_tokens=24, condition_size=32)
    shutil.copy(GOLDEN / "t5_weights_seed52.safetensors", flux / "text_encoder_2" / "model.safetensors")
    with pytest.raises(ConvertError, match="text encoder gives 24 numbers, the transformer takes 10"):
        convert.read(sources(flux), text_tokens=24, condition_size=32)
    with pytest.raises(ConvertError, match=r"conditions\.size \(30\) must be a multiple"):
        convert.read(sources(flux), text_tokens=24, condition_size=30)
    assert not (tmp_path / "bundle").exists()
