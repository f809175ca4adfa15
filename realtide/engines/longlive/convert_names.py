"""Names and shapes of public checkpoints of LongLive, Wan2.1 and UMT5 (their layouts; the code is ours).

Two layouts are known: that of the models' own releases, whose names are the ones this engine uses, and that
of diffusers and transformers. For each part the configuration is read off the shapes, and then every name and
shape is held to what the configuration says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from realtide.engines.longlive.config import TextConfig, TransformerConfig, VaeConfig
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.checkpoint_files import Checkpoint, ConvertError, Stored

Names = Callable[[str], str]
"""From the release's name of a tensor to another layout's."""

# What wrappers of training put into names.
_WRAPPED = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")

_TRANSFORMER = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{
        f"{ours}.{mine}.": f"{theirs}.{other}."
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for mine, other in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}
_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_VAE = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
}
_HALF = {
    "conv1.": "conv_in.",
    "head.0.": "norm_out.",
    "head.2.": "conv_out.",
    "middle.0.": "mid_block.resnets.0.",
    "middle.1.": "mid_block.attentions.0.",
    "middle.2.": "mid_block.resnets.1.",
    "downsamples.": "down_blocks.",
}
_TEXT = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}
_TEXT_BLOCK = {
    "norm1.": "layer.0.layer_norm.",
    "norm2.": "layer.1.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}
_TIED = "encoder.embed_tokens.weight"

# Of the 16 latent channels of Wan2.1's VAE; no file of the release holds them.
WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip
WAN_HEAD_DIM = 128


def transformer(
    found: Checkpoint, settings: Mapping[str, Any], heads: int | None, text_tokens: int
) -> tuple[TransformerConfig, dict[str, Stored]]:
    """The transformer of a checkpoint, by the release's names.

    Args:
        found: the checkpoint.
        settings: its ``config.json``, if it has one.
        heads: of attention; None: as the settings say, else one for every 128 of the width.
        text_tokens: most tokens of a prompt.

    Raises:
        ConvertError: a tensor is missing, unexpected or misshapen.
    """
    found = unwrapped(found, "model.")
    diffusers = any(name.startswith("condition_embedder.") for name in found)
    theirs = _transformer_name if diffusers else str
    size = _Sizes("transformer", found, theirs)
    dim, channels, frames, high, wide = size("patch_embedding.weight", 5)
    if frames != 1 or high != wide:
        raise ConvertError(f"transformer: patches of {[frames, high, wide]} are not supported")
    heads = heads or settings.get("num_attention_heads")
    if heads is None:
        if dim % WAN_HEAD_DIM:
            raise ConvertError(
                f"transformer: width {dim} is no multiple of {WAN_HEAD_DIM}: say how many heads"
            )
        heads = dim // WAN_HEAD_DIM
    config = TransformerConfig(
        layers=_count(found, r"blocks\.(\d+)\."),
        dim=dim,
        heads=heads,
        ff_dim=size("blocks.0.ffn.0.weight", 2)[0],
        freq_dim=size("time_embedding.0.weight", 2)[1],
        channels=channels,
        patch=high,
        text_dim=size("text_embedding.0.weight", 2)[1],
        text_tokens=text_tokens,
        eps=settings.get("eps", 1e-6),
    )
    return config, match("transformer", found, _shapes(lambda: WanTransformer(config)), theirs)


def vae(found: Checkpoint, settings: Mapping[str, Any]) -> tuple[VaeConfig, dict[str, Stored]]:
    """The VAE of a checkpoint, as `transformer`. The latents' statistics are Wan2.1's or the settings'."""
    diffusers = "quant_conv.weight" in found
    flat: Names = _VaeNames(0) if diffusers else str  # of the encoder, whose layers have one count
    size = _Sizes("vae", found, flat)
    dim = size("encoder.conv1.weight", 5)[0]
    latent = size("conv2.weight", 5)[0]
    count = _count(found, flat("encoder.downsamples.").replace(".", r"\.") + r"(\d+)\.")
    halvings = [n for n in range(count) if flat(f"encoder.downsamples.{n}.resample.1.weight") in found]
    starts, ends = [0, *(n + 1 for n in halvings)], [*halvings, count]
    blocks = ends[0]
    widths = [size(f"encoder.downsamples.{end - 1}.residual.6.weight", 5)[0] for end in ends]
    if not blocks or any(end - start != blocks for start, end in zip(starts, ends, strict=True)):
        raise ConvertError(f"vae: levels of the encoder differ in residual blocks (halvings: {halvings})")
    if any(width % dim for width in widths):
        raise ConvertError(f"vae: widths {widths} are no multiples of {dim}")
    mean, std = settings.get("latents_mean"), settings.get("latents_std")
    if mean is None or std is None:
        if latent != len(WAN_MEAN):
            raise ConvertError(f"vae: nothing says the mean and deviation of its {latent} latent channels")
        mean, std = WAN_MEAN, WAN_STD
    config = VaeConfig(
        dim=dim,
        latent=latent,
        multipliers=tuple(width // dim for width in widths),
        residual_blocks=blocks,
        temporal=tuple(flat(f"encoder.downsamples.{n}.time_conv.weight") in found for n in halvings),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )
    theirs: Names = _VaeNames(blocks) if diffusers else str
    return config, match("vae", found, _shapes(lambda: WanVae(config)), theirs)


def text(found: Checkpoint, settings: Mapping[str, Any]) -> tuple[TextConfig, dict[str, Stored]]:
    """The text encoder of a checkpoint, as `transformer`."""
    diffusers = any(name.startswith("encoder.block.") for name in found)
    theirs = _text_name if diffusers else str
    if _TIED in found:  # one table under two names, or only under this one
        tied = {name: stored for name, stored in found.items() if name != _TIED}
        found = {"shared.weight": found[_TIED], **tied}
    size = _Sizes("text", found, theirs)
    vocab, dim = size("token_embedding.weight", 2)
    buckets, heads = size("blocks.0.pos_embedding.embedding.weight", 2)
    config = TextConfig(
        vocab=vocab,
        dim=dim,
        attention_dim=size("blocks.0.attn.q.weight", 2)[0],
        ff_dim=size("blocks.0.ffn.fc1.weight", 2)[0],
        heads=heads,
        layers=_count(found, r"encoder\.block\.(\d+)\." if diffusers else r"blocks\.(\d+)\."),
        buckets=buckets,
        max_distance=settings.get("relative_attention_max_distance", 128),
        eps=settings.get("layer_norm_epsilon", 1e-6),
    )
    return config, match("text", found, _shapes(lambda: TextEncoder(config)), theirs)


def merged(base: Checkpoint, lora: Checkpoint, alpha: float | None) -> dict[str, Stored]:
    """A transformer with low-rank updates on every linear layer of its blocks added: W + alpha/rank * B @ A.

    Args:
        base: the transformer, by the release's names.
        lora: updates by PEFT's names.
        alpha: None: the rank, so that updates are added as they are.

    Raises:
        ConvertError: an update is missing, unexpected or misshapen, or has another rank than the others.
    """
    lora = unwrapped(lora, "base_model.model.")
    lora = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name): stored for name, stored in lora.items()}
    linear = [
        name.removesuffix(".weight")
        for name, stored in base.items()
        if re.match(r"blocks\.\d+\.", name) and name.endswith(".weight") and len(stored.shape) == 2
    ]
    first = f"{linear[0]}.lora_A.weight"
    (rank, _) = _Sizes("lora", lora, str)(first, 2)
    wanted: dict[str, tuple[int, ...]] = {}
    for stem in linear:
        into, out = base[f"{stem}.weight"].shape[::-1]
        wanted[f"{stem}.lora_A.weight"] = (rank, into)
        wanted[f"{stem}.lora_B.weight"] = (out, rank)
    updates = match("lora", lora, wanted, str)
    scale = 1.0 if alpha is None else alpha / rank
    changed = {}
    for stem in linear:
        weight, down, up = (
            base[f"{stem}.weight"],
            updates[f"{stem}.lora_A.weight"],
            updates[f"{stem}.lora_B.weight"],
        )
        changed[f"{stem}.weight"] = replace(weight, read=_sum(weight, down, up, scale))
    return {**base, **changed}


def _sum(weight: Stored, down: Stored, up: Stored, scale: float) -> Callable[[], torch.Tensor]:
    return lambda: weight.read().float() + scale * (up.read().float() @ down.read().float())


def match(
    part: str, found: Checkpoint, wanted: Mapping[str, Sequence[int]], theirs: Names
) -> dict[str, Stored]:
    """Tensors by the wanted names.

    Raises:
        ConvertError: a tensor is missing, unexpected or misshapen; the message names the first and says how
            many more there are.
    """
    names = {name: theirs(name) for name in wanted}
    problems = [f"{other!r} is missing" for other in sorted(set(names.values()) - set(found))]
    problems += [f"{found[other].name!r} is unexpected" for other in sorted(set(found) - set(names.values()))]
    problems += [
        f"{found[other].name!r} is {list(found[other].shape)}, not {list(wanted[name])}"
        for name, other in names.items()
        if other in found and found[other].shape != tuple(wanted[name])
    ]
    if problems:
        files = sorted({stored.file.name for stored in found.values()})
        more = f" (and {len(problems) - 1} more like that)" if len(problems) > 1 else ""
        raise ConvertError(f"{part} ({', '.join(files[:1])}): {problems[0]}{more}")
    return {name: found[other] for name, other in names.items()}


def unwrapped(found: Checkpoint, prefix: str) -> dict[str, Stored]:
    """Names without what training frameworks wrap around them, and without a prefix that all of them have."""
    clean = {_WRAPPED.sub("", name): stored for name, stored in found.items()}
    if all(name.startswith(prefix) for name in clean):
        clean = {name.removeprefix(prefix): stored for name, stored in clean.items()}
    return clean


class _Sizes:
    """Shapes of a checkpoint's tensors by the release's names."""

    def __init__(self, part: str, found: Checkpoint, theirs: Names) -> None:
        self._part, self._found, self._theirs = part, found, theirs

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        other = self._theirs(name)
        stored = self._found.get(other)
        if stored is None:
            raise ConvertError(f"{self._part}: {other!r} is missing")
        if len(stored.shape) != rank:
            raise ConvertError(
                f"{self._part}: {stored.name!r} is {list(stored.shape)}, not {rank}-dimensional"
            )
        return stored.shape


def _count(found: Checkpoint, pattern: str) -> int:
    numbers = [int(at[1]) for at in (re.match(pattern, name) for name in found) if at]
    return max(numbers, default=0) + 1


def _shapes(make: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make().state_dict().items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The name with its beginning replaced, where the table has it."""
    for ours, other in table.items():
        if name.startswith(ours):
            return other + name.removeprefix(ours)
    return name


def _block(name: str) -> tuple[str, str] | None:
    at = re.match(r"blocks\.(\d+)\.", name)
    return (at[1], name[at.end() :]) if at else None


def _transformer_name(name: str) -> str:
    block = _block(name)
    return f"blocks.{block[0]}.{_renamed(block[1], _BLOCK)}" if block else _renamed(name, _TRANSFORMER)


def _text_name(name: str) -> str:
    block = _block(name)
    return f"encoder.block.{block[0]}.{_renamed(block[1], _TEXT_BLOCK)}" if block else _renamed(name, _TEXT)


class _VaeNames:
    """Names of diffusers' VAE. Its decoder counts levels, the release's counts layers.

    Args:
        residual_blocks: of a level of the encoder.
    """

    def __init__(self, residual_blocks: int) -> None:
        self._level = residual_blocks + 2  # the decoder has one more, and then an upsampling

    def __call__(self, name: str) -> str:
        half, _, rest = name.partition(".")
        if half not in ("encoder", "decoder"):
            return _renamed(name, _VAE)
        at = re.match(r"upsamples\.(\d+)\.(.*)", rest)
        if at:
            level, layer = divmod(int(at[1]), self._level)
            kind = "upsamplers.0" if layer == self._level - 1 else f"resnets.{layer}"
            return f"{half}.up_blocks.{level}.{kind}.{_renamed(at[2], _RESIDUAL)}"
        for ours, other in _HALF.items():
            if rest.startswith(ours):
                inner = rest.removeprefix(ours)
                if ours == "downsamples.":
                    number, dot, inner = inner.partition(".")
                    other += number + dot
                return f"{half}.{other}{_renamed(inner, _RESIDUAL)}"
        return name
