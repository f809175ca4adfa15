"""Names and shapes of public checkpoints, brought to the bundle's (ours; needs PyTorch).

FLUX.1's transformer and VAE come in two layouts: diffusers', whose names the modules have, and the original
single files, in which some matrices are stacked. Configurations follow from the shapes; what shapes do not
say stands in ``config.json`` or is FLUX.1's own. Every tensor is accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from realtide.engines.easycontrol import loras
from realtide.engines.easycontrol.config import PooledConfig, TextConfig, TransformerConfig, VaeConfig
from realtide.engines.easycontrol.text import ClipText, T5Encoder
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.easycontrol.vae import Vae
from realtide.engines.runtime.checkpoint_files import Checkpoint, ConvertError, Stored

Parts = dict[str, Stored]
Settings = Mapping[str, Any]

_AXES = (16, 56, 56)
"""FLUX.1's, for heads of 128."""
_GROUPS = 32


def transformer(found: Checkpoint, settings: Settings, text_tokens: int) -> tuple[TransformerConfig, Parts]:
    """FLUX's transformer in either layout.

    Raises:
        ConvertError: a tensor is missing, unexpected or misshapen.
        ValueError: the shapes make no configuration.
    """
    tensors = _single_file(found) if any("double_blocks." in name for name in found) else dict(found)
    shape = _Shapes(tensors, "transformer")
    dim, channels = shape("x_embedder.weight", 2)
    head = shape("transformer_blocks.0.attn.norm_q.weight", 1)[0]
    if dim % head:
        raise ConvertError(f"{shape.file}: a width of {dim} is no multiple of heads of {head}")
    axes = settings.get("axes_dims_rope", _AXES)
    if sum(axes) != head:
        raise ConvertError(f"{shape.file}: config.json must say axes_dims_rope for heads of {head}")
    config = TransformerConfig(
        double_blocks=_count(tensors, "transformer_blocks"),
        single_blocks=_count(tensors, "single_transformer_blocks"),
        heads=dim // head,
        head_dim=head,
        channels=channels,
        text_dim=shape("context_embedder.weight", 2)[1],
        text_tokens=text_tokens,
        pooled_dim=shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shape("time_text_embed.timestep_embedder.linear_1.weight", 2)[1],
        axes=tuple(axes),
        guidance="time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    )
    return config, _held(tensors, lambda: FluxTransformer(config), shape.file)


def vae(found: Checkpoint, settings: Settings) -> tuple[VaeConfig, Parts]:
    """FLUX's VAE in either layout; raises as `transformer`."""
    tensors = _original_vae(found) if any(".mid.block_1." in name for name in found) else dict(found)
    shape = _Shapes(tensors, "VAE")
    levels = _count(tensors, "encoder.down_blocks")
    widths = tuple(
        shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)
    )
    config = VaeConfig(
        latent=shape("decoder.conv_in.weight", 4)[1],
        widths=widths,
        layers=_count(tensors, "encoder.down_blocks.0.resnets"),
        groups=int(settings.get("norm_num_groups", _GROUPS)),
        scaling=float(settings.get("scaling_factor", VaeConfig().scaling)),
        shift=float(settings.get("shift_factor", VaeConfig().shift)),
    )
    return config, _held(tensors, lambda: Vae(config), shape.file)


def text(found: Checkpoint, settings: Settings) -> tuple[TextConfig, Parts]:
    """T5's encoder; raises as `transformer`."""
    tensors = dict(found)
    # The table of embeddings, once more under the name that it is used by.
    tied = tensors.pop("encoder.embed_tokens.weight", None)
    if "shared.weight" not in tensors and tied is not None:
        tensors["shared.weight"] = tied
    shape = _Shapes(tensors, "text encoder")
    vocabulary, dim = shape("shared.weight", 2)
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shape(f"{first}.relative_attention_bias.weight", 2)
    config = TextConfig(
        vocab=vocabulary,
        dim=dim,
        head_dim=shape(f"{first}.q.weight", 2)[0] // heads,
        heads=heads,
        ff_dim=shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        layers=_count(tensors, "encoder.block"),
        buckets=buckets,
        max_distance=int(settings.get("relative_attention_max_distance", TextConfig().max_distance)),
        eps=float(settings.get("layer_norm_epsilon", TextConfig().eps)),
    )
    return config, _held(tensors, lambda: T5Encoder(config), shape.file)


def pooled(found: Checkpoint, settings: Settings) -> tuple[PooledConfig, Parts]:
    """CLIP's text model; raises as `transformer`."""
    prefix = "text_model."
    tensors = {
        name if name.startswith(prefix) else prefix + name: stored
        for name, stored in found.items()
        if not name.endswith("position_ids")
    }
    shape = _Shapes(tensors, "pooled encoder")
    vocabulary, dim = shape("text_model.embeddings.token_embedding.weight", 2)
    config = PooledConfig(
        vocab=vocabulary,
        dim=dim,
        heads=int(settings.get("num_attention_heads", max(dim // 64, 1))),
        ff_dim=shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        layers=_count(tensors, "text_model.encoder.layers"),
        tokens=shape("text_model.embeddings.position_embedding.weight", 2)[0],
        # The vocabulary ends with them; older settings have other numbers for the end.
        start=vocabulary - 2,
        end=vocabulary - 1,
        eps=float(settings.get("layer_norm_eps", PooledConfig().eps)),
        quick=settings.get("hidden_act", "quick_gelu") == "quick_gelu",
    )
    return config, _held(tensors, lambda: ClipText(config), shape.file)


def adapter(found: Checkpoint, config: TransformerConfig, kind: str) -> tuple[int, Parts]:
    """A LoRA of EasyControl's release; its rank, and tensors by the release's names of LoRA 0.

    Raises:
        ConvertError: it is of several conditions, or a tensor is missing, unexpected or misshapen.
    """
    numbers = sorted({match[1] for name in found if (match := re.search(r"_loras\.(\d+)\.", name))})
    if len(numbers) != 1:
        raise ConvertError(
            f"the LoRA of {kind} must be that of one condition (q_loras.N), it has {numbers or 'none'}"
        )
    tensors = {re.sub(r"_loras\.\d+\.", "_loras.0.", name): stored for name, stored in found.items()}
    file = next(iter(found.values())).file
    names = [name for _, _, name in loras.names(config)]
    first = tensors.get(f"{names[0]}.down.weight")
    if first is None:
        raise ConvertError(f"{file}: lacks {names[0]}.down.weight")
    rank = first.shape[0]
    wanted = {f"{name}.down.weight": (rank, config.dim) for name in names}
    wanted |= {f"{name}.up.weight": (config.dim, rank) for name in names}
    return rank, _checked(tensors, wanted, file)


def widened(parts: Mapping[str, Stored], rank: int) -> Parts:
    """A LoRA's tensors at a larger rank: what is added is zero and changes nothing."""

    def grown(stored: Stored, down: bool) -> Stored:
        have = stored.shape[0] if down else stored.shape[1]
        if have == rank:
            return stored
        pad = (0, 0, 0, rank - have) if down else (0, rank - have)
        shape = (rank, stored.shape[1]) if down else (stored.shape[0], rank)
        return replace(stored, shape=shape, read=lambda: nn.functional.pad(stored.read(), pad))

    return {name: grown(stored, ".down." in name) for name, stored in parts.items()}


# Layouts


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Shapes by name, or an error that names what is missing."""

    tensors: Checkpoint
    what: str

    @property
    def file(self) -> str:
        """Where the tensors are."""
        stored = next(iter(self.tensors.values()), None)
        return self.what if stored is None else str(stored.file)

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ConvertError(f"{self.file}: lacks {name!r}: not a {self.what} of FLUX.1")
        shape = self.tensors[name].shape
        if len(shape) != rank:
            raise ConvertError(f"{self.file}: {name!r} is {list(shape)}, must have {rank} dimensions")
        return shape


def _count(tensors: Checkpoint, prefix: str) -> int:
    """How many numbered parts there are behind a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)


def _held(tensors: Checkpoint, make: Callable[[], nn.Module], file: str) -> Parts:
    """The tensors, held to a module's names and shapes."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    return _checked(tensors, wanted, file)


def _checked(tensors: Checkpoint, wanted: Mapping[str, tuple[int, ...]], file: object) -> Parts:
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        what = (
            f"lacks {missing[0]!r}" if missing else f"has {tensors[unexpected[0]].name!r}, which is unknown"
        )
        more = len(missing) + len(unexpected) - 1
        raise ConvertError(f"{file}: {what}" + (f" (and {more} more differences)" if more else ""))
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            have, given = list(tensors[name].shape), tensors[name].name
            raise ConvertError(f"{file}: {given!r} is {have}, must be {list(shape)}")
    return {name: tensors[name] for name in wanted}


def _rows(stored: Stored, first: int, count: int) -> Stored:
    """So many rows of a tensor."""
    return replace(
        stored, shape=(count, *stored.shape[1:]), read=lambda: stored.read()[first : first + count]
    )


_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "final_layer.linear": "proj_out",
    "in_layer": "linear_1",
    "out_layer": "linear_2",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_STACKED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def _single_file(found: Checkpoint) -> Parts:
    """The original layout of the transformer under diffusers' names; unknown names stay as they are."""
    tensors: Parts = {}
    for full, stored in found.items():
        name = full.removeprefix("model.diffusion_model.")
        stem, _, last = name.rpartition(".")
        last = "weight" if last == "scale" else last
        match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", stem)
        if stem == "final_layer.adaLN_modulation.1":
            tensors[f"norm_out.linear.{last}"] = _halves_swapped(stored)
        elif match is None:
            tensors[f"{_outer(stem)}.{last}"] = stored
        elif match[1] == "double":
            block = f"transformer_blocks.{match[2]}"
            if match[3] in _STACKED:
                tensors |= _split(stored, [f"{block}.{part}.{last}" for part in _STACKED[match[3]]], 3)
            else:
                tensors[f"{block}.{_DOUBLE.get(match[3], match[3])}.{last}"] = stored
        else:
            block = f"single_transformer_blocks.{match[2]}"
            if match[3] == "linear1":
                parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                tensors |= _split(stored, [f"{block}.{part}.{last}" for part in parts], 7)
            else:
                tensors[f"{block}.{_SINGLE.get(match[3], match[3])}.{last}"] = stored
    return tensors


def _halves_swapped(stored: Stored) -> Stored:
    """Shift and scale, where diffusers has scale and shift."""
    return replace(stored, read=lambda: torch.cat(stored.read().chunk(2)[::-1]))


def _outer(stem: str) -> str:
    for theirs, ours in _OUTER.items():
        stem = re.sub(rf"(^|(?<=\.)){re.escape(theirs)}(?=\.|$)", ours, stem)
    return stem


def _split(stored: Stored, names: list[str], shares: int) -> Parts:
    """Rows of a stacked tensor: one share for each name, and the rest for the last one."""
    rows = stored.shape[0]
    if rows % shares:
        raise ConvertError(f"{stored.file}: {stored.name!r} has {rows} rows, not a multiple of {shares}")
    share = rows // shares
    sizes = [share] * (len(names) - 1)
    sizes.append(rows - sum(sizes))
    return {
        name: _rows(stored, sum(sizes[:index]), size)
        for index, (name, size) in enumerate(zip(names, sizes, strict=True))
    }


def _original_vae(found: Checkpoint) -> Parts:
    """The original layout of the VAE under diffusers' names; unknown names stay as they are."""
    levels = _count(found, "encoder.down")

    def renamed(name: str) -> str:
        name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
        name = name.replace("mid.attn_1.norm", "mid_block.attentions.0.group_norm")
        name = re.sub(r"mid\.attn_1\.([qkv])\b", r"mid_block.attentions.0.to_\1", name)
        name = name.replace("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0")
        name = re.sub(r"down\.(\d+)\.block\.(\d+)", r"down_blocks.\1.resnets.\2", name)
        name = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", name)

        def level(match: re.Match[str]) -> str:
            return f"up_blocks.{levels - 1 - int(match[1])}."  # numbered from the other end

        name = re.sub(r"\bup\.(\d+)\.", level, name)
        name = re.sub(r"(up_blocks\.\d+)\.block\.", r"\1.resnets.", name)
        name = re.sub(r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", name)
        return name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")

    def flat(stored: Stored) -> Stored:
        # Attention's projections are convolutions of one pixel there.
        shape = stored.shape[:2] if stored.shape[2:] == (1, 1) else stored.shape
        return replace(stored, shape=shape, read=lambda: _shaped(stored.read(), shape))

    return {
        new: flat(stored) if "attentions" in new else stored
        for new, stored in ((renamed(name), stored) for name, stored in found.items())
    }


def _shaped(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return value.reshape(shape) if prod(shape) == value.numel() else value
