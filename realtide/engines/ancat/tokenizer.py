"""Text to token ids and back: a SentencePiece model with the transducer's blank put in front (ours).

Token id 0 is blank and also pads the start context (0, 0). Token id k > 0 is SentencePiece piece k - 1, so
the vocabulary has one entry more than the piece model. A token that begins with the piece model's word mark
(U+2581) starts a new word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

BLANK = 0
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


class Tokenizer:
    """Wraps a SentencePiece model given as a file or as its serialized bytes. Raises OSError, ValueError."""

    def __init__(self, model: Path | str | bytes) -> None:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        n = self._pieces.GetPieceSize()
        self.vocabulary: int = n + 1
        self._surface: list[bytes] = [b""]  # what each token adds to the text, without the word mark
        starts = [False]
        for i in range(n):
            piece: str = self._pieces.IdToPiece(i)
            if self._pieces.IsByte(i):
                surface = bytes((int(piece[3:5], 16),))  # "<0x4A>"
            elif self._pieces.IsControl(i) or self._pieces.IsUnknown(i) or self._pieces.IsUnused(i):
                surface = b""
            else:
                surface = piece.replace(_WORD_MARK, "").encode()
            self._surface.append(surface)
            starts.append(piece.startswith(_WORD_MARK))
        self._starts = tuple(starts)
        # Words are written for every partial result: join strings, and bytes only where a model has byte
        # pieces.
        bytewise = any(self._pieces.IsByte(i) for i in range(n))
        self._strings = None if bytewise else [s.decode() for s in self._surface]
        letters = "".join(s.decode("utf-8", "replace") for s in self._surface)
        self._lower = letters == letters.lower()
        self._upper = letters == letters.upper() and not self._lower

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in the letter case of the model where it has only one.

        Raises ValueError if the text is empty or holds a character that the model has no piece for.
        """
        cased = text.lower() if self._lower else text.upper() if self._upper else text
        ids: list[int] = self._pieces.EncodeAsIds(cased)
        if not ids:
            raise ValueError(f"no text to encode in {text!r}")
        if any(self._pieces.IsUnknown(i) for i in ids):
            raise ValueError(f"{text!r} holds a character that this model does not write")
        return [i + 1 for i in ids]

    def starts_word(self, token: int) -> bool:
        """True if `token` begins with the word mark."""
        return self._starts[token]

    def surface(self, tokens: Sequence[int]) -> str:
        """Text of the tokens of one word, without the word mark."""
        if self._strings is not None:
            return "".join([self._strings[t] for t in tokens])
        return b"".join([self._surface[t] for t in tokens]).decode("utf-8", "replace")

    def words(self, tokens: Sequence[int]) -> list[tuple[str, int, int]]:
        """Words of a token sequence as (text, index of its first token, index of its last token).

        Tokens before the first word mark form a word of their own; words without any text are left out.
        """
        starts, surface, words, first = self._starts, self.surface, [], 0
        for k in range(1, len(tokens) + 1):
            if k == len(tokens) or starts[tokens[k]]:
                text = surface(tokens[first:k])
                if text:
                    words.append((text, first, k - 1))
                first = k
        return words

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a token sequence: its words separated by single spaces."""
        return " ".join(text for text, _, _ in self.words(tokens))
