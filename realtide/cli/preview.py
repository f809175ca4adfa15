"""A video in the terminal while somebody types prompts below it (ours).

A character shows two pixels, one above the other: the upper half block in the colour of the one, on a
background in the colour of the other. The terminal is put into a mode in which keys come one by one and are
not echoed, so that the line that is typed can be drawn together with the picture.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import shutil
import sys
import termios
import tty
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import numpy.typing as npt

from realtide_client import Frames, PromptApplied, VideoInfo

_HOME, _CLEAR_LINE, _CLEAR_BELOW, _RESET = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[0m"
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"  # other screen, no cursor, empty
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_LINES_BELOW = 4  # prompt, message, input, and one that stays free
_HELP = "type a prompt and press Enter; /pause, /resume, /quit"


def picture(frame: npt.NDArray[np.uint8], columns: int, lines: int, true_colour: bool) -> list[str]:
    """A frame [height, width, 3] as at most `lines` lines of at most `columns` characters with colours."""
    height, width = frame.shape[:2]
    factor = max(1.0, width / max(columns, 1), height / max(2 * lines, 1))
    wide, tall = max(1, int(width / factor)), max(2, int(height / factor) // 2 * 2)
    xs = ((np.arange(wide) + 0.5) * width / wide).astype(int)
    ys = ((np.arange(tall) + 0.5) * height / tall).astype(int)
    small = frame[ys][:, xs]
    if not true_colour:
        small = (small.astype(int) * 5 + 127) // 255 @ np.array([[36], [6], [1]]) + 16
    return [_line(small[y], small[y + 1]) for y in range(0, tall, 2)]


def _line(upper: npt.NDArray[Any], lower: npt.NDArray[Any]) -> str:
    parts = []
    last = None
    for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
        if (top, bottom) != last:  # most neighbours are alike
            last = (top, bottom)
            mode = "2" if len(top) == 3 else "5"
            parts.append(f"\x1b[38;{mode};{';'.join(map(str, top))};48;{mode};{';'.join(map(str, bottom))}m")
        parts.append("▀")
    return "".join(parts) + _RESET


class LineEditor:
    """Keys to lines: characters, backspace, Ctrl-U; other control keys do nothing."""

    def __init__(self) -> None:
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._escape = ""

    def feed(self, data: bytes) -> list[str]:
        """Take keys; gives the lines that they complete."""
        lines = []
        for key in self._decoder.decode(data):
            if self._escape or key == "\x1b":
                # A cursor key or the like: up to its letter, which "[" is not.
                self._escape += key
                if (len(self._escape) > 1 and key.isalpha()) or key == "~":
                    self._escape = ""
            elif key in "\r\n":
                lines.append(self.text)
                self.text = ""
            elif key in "\x7f\x08":
                self.text = self.text[:-1]
            elif key == "\x15":
                self.text = ""
            elif key == "\x04" and not self.text:
                lines.append("/quit")
            elif key.isprintable():
                self.text += key
        return lines


class Pipe:
    """Lines of a standard input that is not a terminal; shows nothing."""

    async def lines(self) -> AsyncIterator[str]:
        """Every line, as it comes."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        try:
            while line := await reader.readline():
                yield line.decode(errors="replace")
        finally:
            transport.close()

    def say(self, text: str) -> None:
        """Told on standard error."""
        if text:
            sys.stderr.write(text + "\n")


class Preview:
    """The picture, the prompt in force, what was said last, and the line that is typed.

    Args:
        source: File descriptor of the terminal that is typed at.
        target: File descriptor of the terminal that shows it.
    """

    def __init__(self, source: int = 0, target: int = 1) -> None:
        self._source, self._target = source, target
        self._editor = LineEditor()
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._prompt, self._message = "", _HELP
        self._info: VideoInfo | None = None
        self._frame: Frames | None = None
        self._true_colour = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
        self._before: list[Any] | None = None

    # Display

    def opened(self, info: VideoInfo) -> None:
        """Take the terminal over."""
        self._info = info
        self._before = termios.tcgetattr(self._source)
        tty.setcbreak(self._source)
        asyncio.get_running_loop().add_reader(self._source, self._on_keys)
        self._write(_ENTER)
        self._draw()

    def prompt(self, event: PromptApplied) -> None:
        """Show it below the picture."""
        self._prompt = event.prompt
        if event.control_id:
            self._message = (
                f"in force from frame {event.first_frame}, recached in {event.recache_seconds * 1000:.0f} ms"
            )

    def frames(self, frames: Frames) -> None:
        """Show the last of them."""
        self._frame = frames
        self._draw()

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._before is not None:
            asyncio.get_running_loop().remove_reader(self._source)
            termios.tcsetattr(self._source, termios.TCSADRAIN, self._before)
            self._before = None
            self._write(_LEAVE)

    # Commands

    async def lines(self) -> AsyncIterator[str]:
        """Lines as they are typed."""
        while True:
            yield await self._lines.get()

    def say(self, text: str) -> None:
        """Show it above the line that is typed."""
        self._message = text
        self._draw()

    def _on_keys(self) -> None:
        try:
            keys = os.read(self._source, 4096)
        except OSError:
            keys = b""
        if not keys:  # the terminal has gone
            asyncio.get_running_loop().remove_reader(self._source)
            self._lines.put_nowait("/quit")
            return
        for line in self._editor.feed(keys):
            self._lines.put_nowait(line)
        self._draw()

    def _draw(self) -> None:
        columns, lines = shutil.get_terminal_size()
        rows: list[str] = []
        if self._frame is not None:
            rows = picture(self._frame.rgb[-1], columns, max(lines - _LINES_BELOW, 1), self._true_colour)
        shown = f"{self._frame.end if self._frame else 0:6d}  {self._prompt}"
        rows += [shown[:columns], self._message[:columns], f"> {self._editor.text}"[-columns:]]
        self._write(_HOME + "".join(row + _CLEAR_LINE + "\r\n" for row in rows) + _CLEAR_BELOW)

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._target, data) :]
