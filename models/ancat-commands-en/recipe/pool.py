"""A pool of utterances on disk: one flat array of log-mel frames, one line of JSON per utterance (ours).

    features.npy  float16 [frames of all utterances, 80], log-mel as the front end gives it, not normalised
    index.jsonl   one `Record` per line, in the order of the frames
    audio.npy     int16 [samples of all utterances], 16 kHz mono; only in pools written with audio (dev and
    test sets) cmvn.npy      float32 [2, 80], mean and standard deviation over the pool's frames

Arrays are memory-mapped, so a pool larger than memory can be read at random.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

MEL_BINS = 80
_HEADER_BYTES = 128  # room for the npy header, which is written last, when the shape is known


@dataclass(frozen=True, slots=True)
class Record:
    """One utterance of a pool.

    `offset` and `frames` cut `features`; `sample_offset` and `samples` cut `audio` (zero where a pool has
    none). `words` holds (word, start, end) in seconds from the utterance's first sample where they are known
    exactly (strings put together from single takes), else it is empty. `kind` is real or synthetic; a mix
    with any synthetic part is synthetic. `seconds` is the audio's length.
    """

    name: str
    offset: int
    frames: int
    text: str
    set: str
    split: str
    speaker: str
    kind: str
    seconds: float
    words: tuple[tuple[str, float, float], ...] = ()
    sample_offset: int = 0
    samples: int = 0
    slots: dict[str, str] = field(default_factory=dict)
    sure: bool = True


@dataclass(frozen=True, slots=True)
class Pool:
    """`features` [N, 80] float16 and `audio` [M] int16 or None, memory-mapped; one record per utterance."""

    features: npt.NDArray[np.float16]
    records: tuple[Record, ...]
    audio: npt.NDArray[np.int16] | None

    def mel(self, record: Record) -> npt.NDArray[np.float16]:
        """Log-mel [frames, 80] of one utterance (a view)."""
        return self.features[record.offset : record.offset + record.frames]

    def samples(self, record: Record) -> npt.NDArray[np.float32]:
        """Audio in [-1, 1] of one utterance. Raises ValueError if the pool was written without audio."""
        if self.audio is None:
            raise ValueError("this pool holds no audio")
        cut = self.audio[record.sample_offset : record.sample_offset + record.samples]
        return np.asarray(cut / 32768, np.float32)


def load_pool(path: Path | str) -> Pool:
    """Open the pool in the folder `path`. Raises FileNotFoundError where there is none."""
    folder = Path(path)
    records = []
    with (folder / "index.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            row["words"] = tuple((str(word), float(start), float(end)) for word, start, end in row["words"])
            records.append(Record(**row))
    audio = folder / "audio.npy"
    return Pool(
        features=np.load(folder / "features.npy", mmap_mode="r"),
        records=tuple(records),
        audio=np.load(audio, mmap_mode="r") if audio.exists() else None,
    )


class _Growing:
    """An npy file that grows by appending; its header is completed when it is closed."""

    def __init__(self, path: Path, dtype: str, width: int | None) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.file.write(bytes(_HEADER_BYTES))
        self.dtype, self.width, self.rows = np.dtype(dtype), width, 0

    def append(self, values: npt.NDArray[np.generic]) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.rows += len(values)

    def close(self) -> None:
        shape = (self.rows,) if self.width is None else (self.rows, self.width)
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self.file.seek(0)
        self.file.write(magic + text.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n")
        self.file.close()


class PoolWriter:
    """Writes a pool utterance by utterance; a context manager that finishes the files when it closes."""

    def __init__(self, folder: Path, audio: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._features = _Growing(folder / "features.npy", "<f2", MEL_BINS)
        self._audio = _Growing(folder / "audio.npy", "<i2", None) if audio else None
        self._index = (folder / "index.jsonl").open("w", encoding="utf-8")
        self._sum = np.zeros(MEL_BINS)
        self._square = np.zeros(MEL_BINS)

    def add(
        self,
        record: Record,
        features: npt.NDArray[np.float16],
        samples: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Append one utterance; the offsets and lengths in `record` are filled in here."""
        row = asdict(record) | {"offset": self._features.rows, "frames": len(features)}
        if self._audio is not None:
            if samples is None:
                raise ValueError("this pool is written with audio: samples are needed")
            row |= {"sample_offset": self._audio.rows, "samples": len(samples)}
            self._audio.append(np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16))
        wide = features.astype(np.float64)
        self._sum += wide.sum(axis=0)
        self._square += (wide**2).sum(axis=0)
        self._features.append(features)
        self._index.write(json.dumps(row, ensure_ascii=False) + "\n")

    def cmvn(self) -> npt.NDArray[np.float32]:
        """Mean and standard deviation [2, 80] over the frames written so far."""
        count = max(self._features.rows, 1)
        mean = self._sum / count
        std = np.sqrt(np.maximum(self._square / count - mean**2, 1e-8))
        return np.stack([mean, std]).astype(np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        np.save(self._folder / "cmvn.npy", self.cmvn())
        self._features.close()
        if self._audio is not None:
            self._audio.close()
        self._index.close()


def hours(records: Sequence[Record]) -> float:
    """Hours of audio in `records`."""
    return sum(record.seconds for record in records) / 3600
