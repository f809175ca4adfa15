"""Prompts to padded token ids for the two text encoders (FLUX's release).

T5's ids are its SentencePiece model's own, an end token, then padding that the encoder attends to. CLIP's are
byte pairs between a start and an end token, cut where they are too many: T5 has the whole prompt. A bundle
without byte pairs gives the pooled encoder T5's pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from realtide.engines.easycontrol.config import PooledConfig

Ids = NDArray[np.int64]


class PromptTokenizer:
    """Wraps a SentencePiece model given as a file or as its serialized bytes.

    Args:
        model: for T5 the release's ``spiece.model``.
        limit: tokens of a prompt, end and padding included.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no SentencePiece model, or the model has no end or padding token.
    """

    def __init__(self, model: Path | str | bytes, limit: int) -> None:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self._end: int = self._pieces.eos_id()
        self._padding: int = self._pieces.pad_id()
        if self._end < 0 or self._padding < 0:
            raise ValueError("the SentencePiece model has no end token or no padding")
        self.limit = limit
        self.vocabulary: int = self._pieces.GetPieceSize()

    def pieces(self, prompt: str) -> list[int]:
        """Ids of a prompt and the end token, not padded."""
        return [*self._pieces.EncodeAsIds(prompt), self._end]

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end token included."""
        return len(self.pieces(prompt))

    def encode(self, prompt: str) -> Ids:
        """Padded ids [limit]. Raises ValueError: the prompt is longer than `limit`."""
        ids = self.pieces(prompt)
        if len(ids) > self.limit:
            raise ValueError(f"prompt has {len(ids)} tokens, the model takes at most {self.limit}")
        return np.array([*ids, *[self._padding] * (self.limit - len(ids))], np.int64)


class PooledTokenizer:
    """Padded ids for the pooled encoder.

    Args:
        config: of the encoder.
        pieces: whose ids to take where there are no byte pairs.
        pairs: CLIP's ``tokenizer.json``, read with the library `tokenizers`; None: `pieces` it is.

    Raises:
        ValueError: the file is no tokenizer.
        ImportError: the library is not installed.
    """

    def __init__(self, config: PooledConfig, pieces: PromptTokenizer, pairs: Path | None = None) -> None:
        self._config, self._pieces, self._pairs = config, pieces, None
        if pairs is not None:
            from tokenizers import Tokenizer

            try:
                pair_model: Any = Tokenizer.from_file(str(pairs))
            except Exception as error:  # the library raises its base class
                raise ValueError(f"not a tokenizer: {error}") from None
            pair_model.no_truncation()
            pair_model.no_padding()
            self._pairs = pair_model

    def encode(self, prompt: str) -> Ids:
        """Ids [tokens]: start, the prompt, end, and ends as padding."""
        config = self._config
        if self._pairs is None:
            ids = self._pieces.pieces(prompt)[:-1]
        else:
            ids = list(self._pairs.encode(prompt, add_special_tokens=False).ids)
        begin = [] if config.start < 0 else [config.start]
        room = config.tokens - len(begin) - 1
        whole = [*begin, *ids[:room]]
        return np.array([*whole, *[config.end] * (config.tokens - len(whole))], np.int64)
