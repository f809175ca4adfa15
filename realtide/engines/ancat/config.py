"""Shapes of an ANCAT model: all come from the bundle's manifest (architecture rule 4; ours)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Rule = Literal["adaptive", "causal", "layerwise", "chunked"]

# Keep logits stay within +-6: a bias beyond that opens every arc, or none, so it is also the dial's range.
LOGIT_BOUND = 6.0
GROUP = 4  # most nodes of a stream that attend together
NO_CAP = 1 << 40  # frames; a cap on the lookahead that never binds


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Architecture of the acoustic encoder and the transducer around it.

    Frames are 40 ms encoder frames unless it says otherwise. `rule` is how right context is chosen:
    *adaptive* (ANCAT, at most `right` frames a layer), *causal* (none), *layerwise* (`right` frames in
    each layer) or *chunked* (to the end of the chunk of `right + 1` frames).
    """

    mel_bins: int = 80
    subsample_channels: int = 128
    dim: int = 144
    layers: int = 8
    heads: int = 4
    ff_dim: int = 288
    kernel: int = 9
    left: int = 32
    right: int = 4
    rule: Rule = "adaptive"
    span: bool = True
    scheduler_dim: int = 32
    joiner_dim: int = 160
    vocab: int = 257
    window: int = 7
    stride: int = 4

    def __post_init__(self) -> None:
        for name in ("mel_bins", "dim", "layers", "heads", "ff_dim", "kernel", "left", "joiner_dim", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"encoder.dim ({self.dim}) must be a multiple of encoder.heads ({self.heads})")
        if self.right < 0 or (self.right == 0) != (self.rule == "causal"):
            raise ValueError(
                f"encoder.right must be 0 for rule causal and at least 1 otherwise, got {self.right}"
            )
        if self.rule not in ("adaptive", "causal", "layerwise", "chunked"):
            raise ValueError(
                f"encoder.rule must be adaptive, causal, layerwise or chunked, got {self.rule!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    def waiting(self, step_frames: int) -> int:
        """Most inputs of a layer that are not resolved at any time, plus one.

        A call brings a layer at most `step_frames` inputs and resolves at most as many nodes. At most
        `right` inputs wait for frames that do not exist, so whatever a call cannot resolve for want of
        room, never more than `right` are left over.
        """
        return step_frames + self.right + 1

    def long_ring(self, step_frames: int) -> int:
        """Rows of keys and values a stream and layer: the oldest waiting node's past, and all after."""
        return self.left + self.waiting(step_frames)

    def short_ring(self, step_frames: int) -> int:
        """Rows of what waits, and of the depthwise kernel's past, a stream and layer."""
        return max(self.waiting(step_frames), self.kernel - 1 + step_frames)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderConfig:
        """Build from a manifest's mapping; raises ValueError naming an unknown field."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"encoder has no field {sorted(unknown)[0]!r}")
        return cls(**values)


def threshold(bias: float) -> float:
    """Least keep score of an open arc when `bias` is added to the keep logits (see `model.keep_logits`)."""
    share = -bias / LOGIT_BOUND
    if abs(share) >= 1:
        return math.copysign(math.inf, share)
    return LOGIT_BOUND * math.atanh(share)


def state_shapes(config: EncoderConfig, step_frames: int) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """Streaming state (see `stream`): name -> (rows per slot, row shape, dtype).

    An array has ``slots * rows`` rows.
    """
    long, short = config.long_ring(step_frames), config.short_ring(step_frames)
    shapes: dict[str, tuple[int, tuple[int, ...], str]] = {
        "counts": (1, (config.layers,), "int64"),
        "newest": (1, (config.layers,), "float64"),
    }
    for layer in range(config.layers):
        shapes[f"key_{layer}"] = (config.heads * long, (config.head_dim,), "float32")
        shapes[f"value_{layer}"] = (config.heads * long, (config.head_dim,), "float32")
        if config.rule != "causal":
            shapes[f"residual_{layer}"] = (short, (config.dim,), "float32")
            shapes[f"depth_{layer}"] = (short, (), "int64")
            shapes[f"available_{layer}"] = (short, (), "float64")
        shapes[f"conv_{layer}"] = (short, (config.dim,), "float32")
    return shapes


def static_lanes(step_frames: int) -> int:
    """Frames of a stream that a call of the static step takes: one group of attention."""
    return min(GROUP, step_frames)


def static_shapes(config: EncoderConfig, step_frames: int) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """State of the static step (see `stream_static`): as `state_shapes`, with availabilities as integers."""
    return {
        name: (rows, shape, "int64" if dtype == "float64" else dtype)
        for name, (rows, shape, dtype) in state_shapes(config, step_frames).items()
    }
