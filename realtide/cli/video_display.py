"""What is shown of a video that is being made: objects, a line per prompt, or a bar (ours)."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from realtide.cli.video_session import Summary
from realtide_client import Frames, PromptApplied, VideoInfo

_BAR_AFTER = 2.0  # seconds without a bar


class JsonVideo:
    """One JSON object a line on standard output, written at once."""

    def opened(self, info: VideoInfo) -> None:
        """`type` opened: what was negotiated."""
        self.write(
            {
                "type": "opened",
                "model": info.model,
                "model_version": info.model_version,
                "width": info.width,
                "height": info.height,
                "frames_per_second": info.frames_per_second,
                "seed": info.seed,
                "length_frames": info.length_frames,
                "encoding": info.encoding,
                "prompt": info.prompt,
            }
        )

    def prompt(self, event: PromptApplied) -> None:
        """`type` prompt_applied."""
        self.write(
            {
                "type": "prompt_applied",
                "prompt": event.prompt,
                "first_frame": event.first_frame,
                "recache_seconds": round(event.recache_seconds, 4),
                "recached_latent_frames": event.recached_latent_frames,
            }
        )

    def frames(self, frames: Frames) -> None:
        """`type` frames."""
        self.write(
            {
                "type": "frames",
                "position": frames.position,
                "count": frames.count,
                "bytes": len(frames.data),
                "decoded": frames.timing.processed_position,
                "processing_seconds": round(frames.timing.processing_seconds, 4),
            }
        )

    def close(self) -> None:
        """Nothing to do."""

    def write(self, value: dict[str, Any]) -> None:
        """Print one object."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def done_object(summary: Summary, server_fps: dict[str, float] | None, written: list[str]) -> dict[str, Any]:
    """The last object with `--json`; times in seconds.

    `fps` has frames per second from opening to the last frame by stage: denoised, decoded, delivered, as the
    server counts them; without its metrics the first is null and the others are the client's.
    """
    fps = {"denoised": None, "decoded": _rounded(summary.decoded), "delivered": _rounded(summary.delivered)}
    return {
        "type": "done",
        "frames": summary.frames,
        "seconds": round(summary.seconds, 3),
        "fps": server_fps or fps,
        "first_frame_seconds": _rounded(summary.first_frame, 4),
        "switches": [
            {
                "prompt": switch.prompt,
                "first_frame": switch.first_frame,
                "recache_seconds": round(switch.recache_seconds, 4),
                "after_frame_before_seconds": _rounded(switch.after_frame_before, 4),
                "after_request_seconds": _rounded(switch.after_request, 4),
            }
            for switch in summary.switches
        ],
        "late_frames": summary.late,
        "reconnects": summary.reconnects,
        "files": written,
    }


class PlainVideo:
    """A line per prompt on standard error, and a bar on a terminal if it takes more than two seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._info: VideoInfo | None = None

    def opened(self, info: VideoInfo) -> None:
        """Say what was negotiated."""
        self._info = info
        self._began = time.monotonic()
        self._console.print(
            f"{info.model}: {info.width}x{info.height}, {info.frames_per_second:g} frames/s, seed {info.seed}"
        )

    def prompt(self, event: PromptApplied) -> None:
        """Say from when on it is in force."""
        rate = self._info.frames_per_second if self._info is not None else 1.0
        line = f"{event.first_frame / rate:7.2f} s  {escape(event.prompt)}"
        if event.recached_latent_frames:
            line += f" [dim](recached in {event.recache_seconds * 1000:.0f} ms)[/]"
        self._console.print(line)

    def frames(self, frames: Frames) -> None:
        """Move the bar; the first after two seconds makes it."""
        if self._info is None or not self._console.is_terminal:
            return
        if self._progress is None:
            if time.monotonic() - self._began < _BAR_AFTER:
                return
            columns: list[Any] = [TextColumn("[dim]{task.completed:.1f} s of video"), BarColumn(bar_width=30)]
            if self._info.length_frames is not None:
                columns.append(TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            length = self._info.length_frames
            total = None if length is None else length / self._info.frames_per_second
            self._task = self._progress.add_task("video", total=total)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=frames.end / self._info.frames_per_second)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)
