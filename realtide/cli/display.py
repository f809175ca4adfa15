"""How results are shown: one object a line, plain lines, or live on a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from realtide_client import Final, Partial, Word


class Display(Protocol):
    """Shows results as they come. Used as a context manager by `realtide transcribe`."""

    def partial(self, result: Partial, delay: float | None) -> None:
        """An interim hypothesis; `delay`: seconds from its last word's audio to its arrival, if known."""
        ...

    def final(self, result: Final, delay: float | None) -> None:
        """An utterance's result; `delay`: seconds from its last word's audio to its arrival, if known."""
        ...

    def sent(self, seconds: float) -> None:
        """So much audio has been sent."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""
        ...


def as_object(result: Partial | Final, delay: float | None) -> dict[str, Any]:
    """A result as it is printed with `--json`. Times in seconds, lookahead in milliseconds.

    `type` is "partial" or "final"; `delay_seconds` is null where nothing was paced like speech.
    """
    common = {
        "type": "partial" if isinstance(result, Partial) else "final",
        "text": result.text,
        "words": [_word(word) for word in result.words],
        "utterance": result.utterance,
        "audio_processed": round(result.audio_processed, 3),
        "lookahead_mean_ms": round(result.lookahead_mean_ms, 1),
        "processing_ms": round(result.timing.processing_seconds * 1000, 2),
        "delay_seconds": None if delay is None else round(delay, 3),
    }
    if isinstance(result, Partial):
        return common | {"stability": round(result.stability, 3), "end_likely": result.end_likely}
    return common | {
        "start": round(result.start, 3),
        "end": round(result.end, 3),
        "speech_end": round(result.speech_end, 3),
        "confidence": round(result.confidence, 4),
        "lookahead_p90_ms": round(result.lookahead_p90_ms, 1),
        "reason": result.reason,
        "alternatives": [
            {"text": alternative.text, "log_probability": round(alternative.log_probability, 4)}
            for alternative in result.alternatives
        ],
    }


def _word(word: Word) -> dict[str, Any]:
    return {
        "text": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
        "lookahead_ms": round(word.lookahead_ms, 1),
    }


class JsonDisplay:
    """One JSON object a line on standard output, written at once."""

    def partial(self, result: Partial, delay: float | None) -> None:
        """Print it."""
        self._print(result, delay)

    def final(self, result: Final, delay: float | None) -> None:
        """Print it."""
        self._print(result, delay)

    def sent(self, seconds: float) -> None:
        """Not shown."""

    def close(self) -> None:
        """Nothing to do."""

    def _print(self, result: Partial | Final, delay: float | None) -> None:
        sys.stdout.write(json.dumps(as_object(result, delay), ensure_ascii=False) + "\n")
        sys.stdout.flush()


class PlainDisplay:
    """Finals that have text, one a line; for pipes and files. Long audio shows its progress on a terminal."""

    def __init__(self, seconds: float | None) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = _progress(console, seconds)
            self._task = _task(self._progress, seconds)
            self._progress.start()

    def partial(self, result: Partial, delay: float | None) -> None:
        """Not shown."""

    def final(self, result: Final, delay: float | None) -> None:
        """Print its text, if it has any."""
        if result.text:
            sys.stdout.write(result.text + "\n")
            sys.stdout.flush()

    def sent(self, seconds: float) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=seconds)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()


class LiveDisplay:
    """Finals stay as lines; below them the hypothesis as it grows, dim where it may still change."""

    def __init__(self, seconds: float | None, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._progress = _progress(self._console, seconds)
        self._task = _task(self._progress, seconds)
        self._text = Text()
        self._live = Live(self._picture(), console=self._console, refresh_per_second=20, transient=True)
        self._live.start()

    def partial(self, result: Partial, delay: float | None) -> None:
        """Replace the hypothesis."""
        words = result.text.split()
        stable = round(len(words) * result.stability)
        self._text = Text()
        self._text.append(" ".join(words[:stable]))
        self._text.append((" " if 0 < stable < len(words) else "") + " ".join(words[stable:]), style="dim")
        self._text.append("" if result.end_likely else " …", style="dim")
        self._live.update(self._picture())

    def final(self, result: Final, delay: float | None) -> None:
        """Turn the hypothesis into a line."""
        self._text = Text()
        if result.text:
            line = Text(result.text, style="bold")
            note = f"  {result.start:.2f}-{result.speech_end:.2f} s, confidence {result.confidence:.2f}"
            note += f", lookahead {result.lookahead_mean_ms:.0f} ms"
            note += "" if delay is None else f", final after {delay * 1000:.0f} ms"
            self._console.print(line + Text(note, style="dim"))
        self._live.update(self._picture())

    def sent(self, seconds: float) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=seconds)

    def close(self) -> None:
        """Remove what is not final."""
        self._live.stop()

    def _picture(self) -> Group:
        return Group(self._text, self._progress)


def _progress(console: Console, seconds: float | None) -> Progress:
    columns: list[Any] = [TextColumn("[dim]{task.completed:.1f} s"), BarColumn(bar_width=30)]
    if seconds is not None:
        columns.append(TextColumn("[dim]{task.total:.1f} s"))
    return Progress(*columns, console=console, transient=True)


def _task(progress: Progress, seconds: float | None) -> TaskID:
    return progress.add_task("audio", total=seconds)
