"""Prompts to token ids: cleaned as in Wan's release, then SentencePiece as UMT5 has it.

Ids are the piece model's own; an end token follows the text. The release pads to 512 tokens; here nothing is
padded, because the encoder gives zeros for padding whatever it holds.

The release also repairs wrongly decoded text with `ftfy`. Of that only what changes well-formed text is done
here: composed characters (NFC), straight quotes, ligatures taken apart, full-width forms made narrow.
"""

from __future__ import annotations

import html
import re
import unicodedata
from pathlib import Path

import sentencepiece

_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'}
)
_NARROW: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_LIGATURES: dict[int, int | str] = {
    code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)
}


def clean(text: str) -> str:
    """The prompt as the tokenizer should see it.

    Character forms as the module's documentation says, HTML entities resolved (twice, as the release does:
    prompts come escaped more than once), runs of white space turned into one space.
    """
    text = text.translate(_NARROW | _LIGATURES).translate(_QUOTES)
    text = unicodedata.normalize("NFC", text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Wraps a SentencePiece model given as a file or as its serialized bytes.

    Args:
        model: for UMT5 the release's ``spiece.model``.
        limit: most tokens of a prompt, the end token included.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no SentencePiece model, or the model has no end token.
    """

    def __init__(self, model: Path | str | bytes, limit: int) -> None:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self._end: int = self._pieces.eos_id()
        if self._end < 0:
            raise ValueError("the SentencePiece model has no end token")
        self.limit = limit
        self.vocabulary: int = self._pieces.GetPieceSize()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, cleaned, with the end token.

        Raises:
            ValueError: the prompt is longer than `limit`.
        """
        ids = self._ids(prompt)
        if len(ids) > self.limit:
            raise ValueError(f"prompt has {len(ids)} tokens, the model takes at most {self.limit}")
        return ids

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the end token included."""
        return len(self._ids(prompt))

    def _ids(self, prompt: str) -> list[int]:
        return [*self._pieces.EncodeAsIds(clean(prompt)), self._end]
