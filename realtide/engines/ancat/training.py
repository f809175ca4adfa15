"""One training step of an ANCAT transducer: arcs, losses and the schedule they follow (ours).

The same step trains ANCAT and its baselines; only the rule that opens arcs differs. For ANCAT the arcs
are sampled from a binary concrete distribution (logistic noise, temperature annealed) and a per-utterance
bias is drawn, so that one set of weights has met every setting of the run-time dial. A share of steps may
use other rules (*mixed* pre-training), from which ANCAT and every baseline then start alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.model import Transducer, keep_logits
from realtide.engines.ancat.offline import Arcs, depth_arcs, encode, span
from realtide.engines.ancat.regularizers import algorithmic_penalty, compute_penalty, naive_penalty
from realtide.engines.ancat.rnnt import fused_rnnt_loss


@dataclass(slots=True)
class Schedule:
    """Hyper-parameters of one training run. Steps are optimizer steps."""

    steps: int = 3000
    peak_lr: float = 2e-3
    final_lr: float = 2e-5
    warmup: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.1
    rnnt_weight: float = 1.0
    ctc_weight: float = 0.3
    align_weight: float = 0.0  # of the cross-entropy of frames whose unit is known, through the CTC head
    fastemit: float = 0.01
    temperature: tuple[float, float] = (1.0, 0.3)
    # fraction of steps after which arcs are hard in the forward pass (straight-through)
    hard_from: float = 0.6
    bias_range: float = 5.0  # per-utterance bias is drawn from [-bias_range, bias_range]
    naive: float = 0.0
    algorithmic: float = 0.0  # weight per frame of relaxed algorithmic latency
    compute: float = 0.0  # weight per second of relaxed user-perceived latency
    node_seconds: float = 1e-4
    # probability of each rule a step; empty: the model's own rule
    mixed: dict[str, float] = field(default_factory=dict)

    def lr(self, step: int) -> float:
        """Linear warm-up, cosine decay."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        t = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + 0.5 * (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * min(1.0, t)))


@dataclass(slots=True)
class Batch:
    """One batch: windows [B, T, 7, mel], frames [B], targets [B, U] (0 padded), lengths [B].

    units [B, P] (0 padded) and unit_lengths [B] are the CTC head's targets; labels [B, T] are the units of
    frames where they are known, else -100.
    """

    windows: Tensor
    frames: Tensor
    targets: Tensor
    lengths: Tensor
    units: Tensor
    unit_lengths: Tensor
    labels: Tensor


class ArcSampler:
    """Chooses arcs for one training step and remembers the soft arcs that the regularizers need."""

    def __init__(
        self,
        config: EncoderConfig,
        schedule: Schedule,
        progress: float,
        rule: str,
        generator: torch.Generator,
        batch: int,
    ) -> None:
        self.config, self.rule = config, rule
        self.generator = generator
        low, high = schedule.temperature[1], schedule.temperature[0]
        self.temperature = high * (low / high) ** progress
        self.hard = progress >= schedule.hard_from
        self.noise = (
            1.0
            if not self.hard
            else max(0.0, 1 - (progress - schedule.hard_from) / max(1e-6, 0.9 - schedule.hard_from))
        )
        self.bias = (torch.rand(batch, 1, 1, generator=generator) * 2 - 1) * schedule.bias_range
        self.size = int(torch.randint(0, 1 << 30, (1,), generator=generator))
        self.soft: list[Tensor] = []

    def fixed(self, frames: int) -> Tensor:
        """0/1 arcs [1, T, right] of rules that ignore the signal; mixed training draws their sizes."""
        right, i = self.config.right, torch.arange(frames)
        own = self.rule == self.config.rule
        if self.rule == "causal":
            depth = torch.zeros(frames, dtype=torch.long)
        elif self.rule == "layerwise":
            depth = torch.full((frames,), right if own else 1 + self.size % min(4, right))
        else:
            chunk = right + 1 if own else (2, 4, 8, 16)[self.size % 4]
            depth = chunk - 1 - i % chunk
        return depth_arcs(depth, right).unsqueeze(0)

    def __call__(self, _: int, scores: Tensor | None, frames: int) -> Tensor:
        """Arcs of one layer, see `offline.Arcs`."""
        if self.rule != "adaptive" or scores is None:
            return self.fixed(frames)
        z = keep_logits(scores.float())
        uniform = torch.rand(z.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        noise = (uniform.log() - (-uniform).log1p()) * self.noise
        logits = (z + self.bias + noise) / self.temperature
        soft = span(logits) if self.config.span else torch.sigmoid(logits)
        self.soft.append(soft)
        if not self.hard:
            return soft
        hard = (soft >= 0.5).float()
        if not self.config.span:  # as `offline.hard_arcs`: the farthest open arc opens all nearer ones
            hard = hard.flip(-1).cummax(-1).values.flip(-1)
        return hard + soft - soft.detach()


def losses(
    model: Transducer, batch: Batch, sampler: ArcSampler, schedule: Schedule, *, bf16: bool
) -> dict[str, Tensor]:
    """All losses of a step, each a scalar; `total` is what is minimized.

    Transducer and CTC losses are nats a token and a unit of the batch, not an utterance: batches are of one
    length, and long utterances' gradients would else drown those of short ones in Adam's second moment.
    """
    with torch.autocast(batch.windows.device.type, torch.bfloat16, enabled=bf16):
        arcs: Arcs = sampler
        out = encode(
            model.encoder, batch.windows, batch.frames, arcs, dropout=schedule.dropout, tap=model.tap
        )
        history = F.pad(batch.targets, (2, 0))
        contexts = torch.stack([history[:, :-1], history[:, 1:]], -1)  # [B, U + 1, 2]
        predicted = model.predictor(contexts)
        ctc_logits = model.ctc(out.tapped)
    parts: dict[str, Tensor] = {}
    total = out.rows.new_zeros((), dtype=torch.float32)
    if schedule.rnnt_weight:
        last = model.joiner.out
        parts["rnnt"] = fused_rnnt_loss(
            out.rows.float(), predicted.float(), last.weight, last.bias, batch.targets, batch.frames,
            batch.lengths,
            fastemit=schedule.fastemit, reduction="sum",
        ) / (batch.lengths + 1).sum()  # fmt: skip
        total = total + schedule.rnnt_weight * parts["rnnt"]
    if schedule.ctc_weight:
        log_probs = F.log_softmax(ctc_logits.float(), -1).transpose(0, 1)
        each = F.ctc_loss(
            log_probs, batch.units, batch.frames, batch.unit_lengths, reduction="none", zero_infinity=True
        )
        parts["ctc"] = each.sum() / (batch.unit_lengths + 1).sum()
        total = total + schedule.ctc_weight * parts["ctc"]
    if schedule.align_weight and bool((batch.labels >= 0).any()):
        parts["align"] = F.cross_entropy(ctc_logits.float().flatten(0, 1), batch.labels.flatten())
        total = total + schedule.align_weight * parts["align"]
    config = model.config
    if sampler.soft:
        soft = torch.stack(sampler.soft, 1)
        for name, weight in (
            ("naive", schedule.naive),
            ("algorithmic", schedule.algorithmic),
            ("compute", schedule.compute),
        ):
            if not weight:
                continue
            if name == "naive":
                value = naive_penalty(soft, batch.frames)
            elif name == "algorithmic":
                value = algorithmic_penalty(soft, batch.frames, independent=not config.span)
            else:
                value = compute_penalty(
                    soft,
                    batch.frames,
                    cost_seconds=schedule.node_seconds,
                    frame_seconds=0.04,
                    independent=not config.span,
                )
            parts[name] = value.mean.float()
            total = total + weight * parts[name]
    parts["total"] = total
    return parts


def average(shadow: dict[str, Tensor], model: Transducer, decay: float) -> None:
    """Exponential moving average of the weights, in place."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            shadow[name].lerp_(value, 1 - decay)
