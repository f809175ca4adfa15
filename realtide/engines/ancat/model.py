"""The ANCAT network: encoder blocks with attention schedulers, predictor, joiner; plain PyTorch modules.

One definition serves training, eager streaming, ONNX export and TensorRT (architecture rule 2): a block
is cut in two halves, `arrive` (all that depends on one input frame alone) and `resolve` (all that follows
once the frames it attends to exist). `offline.py` joins them over whole utterances, `stream.py` over ring
caches. Nothing is kept on the modules.

Sources: conformer transducer with per-layer attention schedulers, Strimel et al. 2023 (arXiv 2305.04159);
the schedulers' parametrization, learned relative position biases and the 7-frame front end are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.ancat.config import LOGIT_BOUND, EncoderConfig


class Subsample(nn.Module):
    """Two strided causal convolutions as matrix products: 7 log-mel frames (10 ms) to one of 40 ms.

    Encoder frame i sees log-mel frames 4i-3 .. 4i+3, so a window is a pure function of its row: no state
    in the graph.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.first = nn.Linear(3 * config.mel_bins, config.subsample_channels)
        self.second = nn.Linear(3 * config.subsample_channels, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, windows: Tensor) -> Tensor:
        """windows [..., 7, mel] -> frames [..., dim]."""
        taps = torch.cat(
            [
                windows[..., 0:3, :].flatten(-2),
                windows[..., 2:5, :].flatten(-2),
                windows[..., 4:7, :].flatten(-2),
            ],
            -1,
        )
        taps = torch.unflatten(taps, -1, (3, -1))  # [..., 3, 3 * mel]
        hidden = F.silu(self.first(taps))
        frames: Tensor = self.norm(self.second(hidden.flatten(-2)))
        return frames


class FeedForward(nn.Module):
    """Pre-norm feed-forward module of a macaron pair; the customary factor of one half is in the weights."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ff_dim)
        self.down = nn.Linear(config.ff_dim, config.dim)
        with torch.no_grad():
            self.down.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        out: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return out


def keep_logits(scores: Tensor) -> Tensor:
    """Keep logits of scores: within +-LOGIT_BOUND, so that a bias beyond that opens every arc, or none."""
    return LOGIT_BOUND * torch.tanh(scores / LOGIT_BOUND)


class Scheduler(nn.Module):
    """Decides from a layer's input at frame i alone how far frame i looks ahead (paper; form ours)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.dim, config.scheduler_dim)
        self.out = nn.Linear(config.scheduler_dim, config.right)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, 0.5)

    def forward(self, h: Tensor) -> Tensor:
        """h [..., dim] -> keep scores [..., right] of arcs to frames i+1 .. i+right, see `keep_logits`."""
        scores: Tensor = self.out(F.silu(self.hidden(h)))
        return scores


class Convolution(nn.Module):
    """Conformer convolution module with a causal depthwise kernel."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.gate = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = nn.Parameter(torch.randn(config.kernel, config.dim) * config.kernel**-0.5)
        self.depthwise_bias = nn.Parameter(torch.zeros(config.dim))
        self.inner_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def enter(self, x: Tensor) -> Tensor:
        """x [..., dim] -> gated input of the depthwise kernel [..., dim]."""
        return F.glu(self.gate(self.norm(x)), -1)

    def leave(self, taps: Tensor) -> Tensor:
        """taps [..., kernel, dim], oldest first -> [..., dim]."""
        mixed = (taps * self.depthwise).sum(-2) + self.depthwise_bias
        out: Tensor = self.out(F.silu(self.inner_norm(mixed)))
        return out

    def whole(self, c: Tensor) -> Tensor:
        """c [B, T, dim] from `enter` -> [B, T, dim]: `leave` over every frame, zeros before the first."""
        kernel = self.depthwise.shape[0]
        weight = self.depthwise.t().unsqueeze(1)  # [dim, 1, kernel]
        padded = F.pad(c.transpose(1, 2), (kernel - 1, 0))
        mixed = (
            F.conv1d(padded, weight.to(padded.dtype), groups=weight.shape[0]).transpose(1, 2)
            + self.depthwise_bias
        )
        out: Tensor = self.out(F.silu(self.inner_norm(mixed)))
        return out


class Block(nn.Module):
    """A conformer block whose self-attention waits for as much future as its scheduler asks for.

    Keys and queries are normalised over each head, with a gain that the layer's heads share: without it their
    products grew in training until the softmax picked single frames. Source: Dehghani et al. 2023,
    "Scaling vision transformers to 22 billion parameters" (arXiv 2302.05442), section 2.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.ff1 = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.query = nn.Linear(config.dim, config.dim)
        self.key_norm = nn.LayerNorm(config.head_dim)
        self.query_norm = nn.LayerNorm(config.head_dim)
        with torch.no_grad():
            self.query_norm.weight.mul_(config.head_dim**-0.5)
        self.attention_out = nn.Linear(config.dim, config.dim)
        self.relative = nn.Parameter(torch.zeros(config.heads, config.left + 1 + config.right))
        self.scheduler = Scheduler(config) if config.rule == "adaptive" else None
        self.conv = Convolution(config)
        self.ff2 = FeedForward(config)
        with torch.no_grad():
            # Residual branches start small: gradients reach the front end at once.
            for branch in (self.ff1.down, self.ff2.down, self.attention_out, self.conv.out):
                branch.weight.mul_(0.3)
                branch.bias.mul_(0.3)

    def arrive(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All that depends on one input frame alone.

        x [..., dim] -> (residual [..., dim], keys and values, each [..., heads, head dim], keep scores
        [..., right] or None).
        """
        residual = x + self.ff1(x)
        h = self.attention_norm(residual)
        key, value = self._heads(self.key(h)), self._heads(self.value(h))
        return residual, self.key_norm(key), value, None if self.scheduler is None else self.scheduler(h)

    def queries(self, residual: Tensor) -> Tensor:
        """residual [..., dim] -> queries [..., heads, head dim]; the scale is in the norm's gain."""
        out: Tensor = self.query_norm(self._heads(self.query(self.attention_norm(residual))))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1))

    def finish(self, x: Tensor, convolved: Tensor) -> Tensor:
        """x [..., dim] after attention and the convolution's output -> the block's output [..., dim]."""
        x = x + convolved
        out: Tensor = x + self.ff2(x)
        return out


class Encoder(nn.Module):
    """Subsampling, L blocks, and the projection into the joiner's space."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample = Subsample(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.project = nn.Linear(config.dim, config.joiner_dim)

    def leave(self, x: Tensor) -> Tensor:
        """x [..., dim], the last block's output -> rows in the joiner's space [..., joiner_dim]."""
        rows: Tensor = self.project(self.norm(x))
        return rows


class Predictor(nn.Module):
    """Stateless predictor over the last two tokens (0 stands for the start).

    So a hypothesis is resumed from two integers.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.older = nn.Embedding(config.vocab, config.joiner_dim)
        self.newer = nn.Embedding(config.vocab, config.joiner_dim)
        self.project = nn.Linear(config.joiner_dim, config.joiner_dim)

    def forward(self, contexts: Tensor) -> Tensor:
        """contexts [..., 2] int64, older first -> [..., joiner_dim]."""
        out: Tensor = self.project(F.silu(self.older(contexts[..., 0]) + self.newer(contexts[..., 1])))
        return out


class Joiner(nn.Module):
    """Combines encoder and predictor rows into logits over the vocabulary (id 0 is blank)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.joiner_dim, config.vocab)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """encoded [..., J] + predicted [..., J] (broadcast) -> logits [..., V]."""
        logits: Tensor = self.out(torch.tanh(encoded + predicted))
        return logits


class Transducer(nn.Module):
    """The whole model, and in training an auxiliary CTC head that is not exported.

    `ctc` reads the encoder after `tap` blocks and tells `units` classes (blank included), by default the
    vocabulary: the lower blocks learn what is said, the upper ones to put it into words.
    """

    def __init__(self, config: EncoderConfig, units: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.tap = -(-config.layers * 3 // 4)
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.joiner = Joiner(config)
        self.ctc = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, units or config.vocab))


class JoinerProgram(nn.Module):
    """Predictor and joiner as the search calls them: encoder rows and contexts to log-probabilities."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.predictor, self.joiner = model.predictor, model.joiner

    def forward(self, encoded: Tensor, contexts: Tensor) -> Tensor:
        """encoded [M, J], contexts [M, 2] int64 -> log-probabilities [M, V]."""
        return F.log_softmax(self.joiner(encoded, self.predictor(contexts)), -1)
