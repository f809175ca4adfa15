"""Recognizes pools with whole-utterance encoding and hard arcs; keeps what latency is computed from (ours).

Streaming equals this to 1e-4 and token for token (tests/engines/ancat), and it is many times faster. Search
is the product's own. Utterances are not cut by endpointing: each is searched to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from realtide.bench.pools import Batch, Pool, batches
from realtide.bundle import load_bundle
from realtide.cli.errors import CommandError
from realtide.engines.ancat import latency
from realtide.engines.ancat.boost import Gains
from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.frontend import Float32
from realtide.engines.ancat.model import JoinerProgram, Transducer
from realtide.engines.ancat.offline import encode, hard_arcs, windows_of
from realtide.engines.ancat.search import START, Context, Int64, greedy
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.torch_programs import build
from realtide.engines.ancat.utterance import DecoderConfig
from realtide.engines.runtime.weights import WeightFile

NEVER = 1 << 40


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to recognize, with the normalisation of its features and how it is searched."""

    network: Transducer
    tokenizer: Tokenizer
    mean: Float32
    std: Float32
    search: DecoderConfig


def load_model(path: Path, cmvn: Path | None, tokenizer: Path | None, repeat_gain: float = 0.0) -> Model:
    """Load a bundle, or a checkpoint of the recipe, which needs `cmvn` [2, mel] and `tokenizer`.

    A bundle says itself what a token that follows itself gains; `repeat_gain` is for a checkpoint. Raises
    CommandError.
    """
    try:
        if path.is_dir():
            bundle = load_bundle(path)
            weights = WeightFile(bundle.weights)
            config = EncoderConfig.from_dict(bundle.manifest.architecture["encoder"])
            mean, std = (np.asarray(weights[f"features.{name}"], np.float32) for name in ("mean", "std"))
            search = DecoderConfig(**bundle.manifest.architecture.get("search", {}))
            return Model(build(config, weights), Tokenizer(bundle.asset("tokenizer")), mean, std, search)
        if cmvn is None or tokenizer is None:
            raise CommandError(f"{path} is a checkpoint: give --cmvn and --tokenizer")
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        config = EncoderConfig.from_dict(saved["config"])
        network = build(config, {name: value.numpy() for name, value in saved["weights"].items()})
        both = np.load(cmvn)
        search = DecoderConfig(repeat_gain=repeat_gain)
        return Model(network.eval(), Tokenizer(tokenizer), both[0], both[1], search)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(f"{path} cannot be loaded: {error}") from None


@dataclass(frozen=True, slots=True)
class Recognized:
    """One utterance. Frames count from its start.

    Attributes:
        index: of the utterance in the pool.
        words: (text, row of its last token).
        depths: [L, T] lookahead of every node, clipped to the utterance.
        available: [T] newest input frame that each row needed.
    """

    index: int
    words: tuple[tuple[str, int], ...]
    depths: npt.NDArray[np.int16]
    available: Int64

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(text for text, _ in self.words)


class _Hypothesis:
    """A stream of the product's search that never ends before its rows do."""

    bonus: Gains | None = None

    def __init__(self, search: DecoderConfig) -> None:
        self._search = search
        self.context: Context = START
        self.tokens: list[int] = []
        self.rows: list[int] = []

    def horizon(self) -> int:
        return NEVER

    def repeatable(self) -> int:
        return self.rows[-1] + self._search.repeat_frames if self.rows else NEVER

    def expires(self) -> int:
        return self.rows[-1] + self._search.context_frames if self.rows else NEVER

    def emit(self, row: int, token: int, log_prob: float) -> None:
        self.context = (START[1] if row >= self.expires() else self.context[1], token)
        self.tokens.append(token)
        self.rows.append(row)

    def cut(self, row: int) -> None:
        raise AssertionError("an utterance without an end was cut")


@torch.inference_mode()
def recognize(
    model: Model, pool: Pool, bias: float, on_batch: Callable[[int], None] = lambda _: None
) -> list[Recognized]:
    """Every utterance of `pool`; `on_batch` hears how many were done."""
    config = model.network.config
    program = JoinerProgram(model.network)

    def joiner(rows: Float32, contexts: Int64) -> Float32:
        out: Float32 = program(torch.from_numpy(rows), torch.from_numpy(contexts)).numpy()
        return out

    found: list[Recognized] = []
    for batch in batches(pool, model.mean, model.std, config.stride):
        lengths = torch.from_numpy(batch.frames)
        windows = windows_of(torch.from_numpy(batch.features), config)
        encoded = encode(model.network.encoder, windows, lengths, hard_arcs(config, bias))
        found += _searched(model, batch, encoded.rows, encoded.arcs.numpy(), joiner)
        on_batch(len(batch.picked))
    return sorted(found, key=lambda utterance: utterance.index)


def _searched(
    model: Model, batch: Batch, rows: torch.Tensor, arcs: npt.NDArray[Any], joiner: Any
) -> Iterable[Recognized]:
    size, steps = rows.shape[:2]
    depths = latency.depths_from_arcs(arcs)
    depths = latency.clip_depths(np.broadcast_to(depths, (size, *depths.shape[1:])), batch.frames)
    available = latency.availability(depths, batch.frames)[:, -1]
    valid = np.arange(steps) < batch.frames[:, None]
    search = model.search
    hypotheses = [_Hypothesis(search) for _ in range(size)]
    counts = batch.frames.tolist()
    greedy(joiner, rows.numpy()[valid], hypotheses, counts, search.max_symbols, search.repeat_gain)
    for at, (index, hypothesis) in enumerate(zip(batch.picked, hypotheses, strict=True)):
        length = int(batch.frames[at])
        words = tuple(
            (text, hypothesis.rows[last]) for text, _, last in model.tokenizer.words(hypothesis.tokens)
        )
        yield Recognized(index, words, depths[at, :, :length].astype(np.int16), available[at, :length].copy())
