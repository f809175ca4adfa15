"""What a terminal shows, and audio that comes from a microphone."""

from __future__ import annotations

import io
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from realtide.cli import audio
from realtide.cli.demo import figures
from realtide.cli.display import LiveDisplay
from realtide.cli.errors import CommandError
from realtide.cli.session import Summary
from realtide_client import Final, Partial, Timing
from tests.cli.conftest import Process, Run

TIMING = Timing(0, 0, 0.0, 0.0, 0.0)


def partial(text: str, stability: float, end_likely: bool = False) -> Partial:
    return Partial(text, (), stability, 1.0, 80.0, 0, end_likely, TIMING)


def test_a_terminal_shows_the_hypothesis_dim_where_it_may_change_and_keeps_finals() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system="standard", legacy_windows=False)
    display = LiveDisplay(4.0, console)
    display.partial(partial("one two three four", 0.5), None)
    display.sent(2.0)
    picture = display._picture()
    with console.capture() as captured:
        console.print(picture)
    assert "one two\x1b[2m three four\x1b[0m" in captured.get()
    assert "2.0 s" in captured.get()
    assert "4.0 s" in captured.get()
    display.final(Final("one two", (), 0.9, 0.5, 2.0, 1.5, 2.0, 80.0, 120.0, 0, "endpoint", (), TIMING), 0.25)
    display.close()
    shown = out.getvalue()
    assert "one two" in shown
    assert "0.50-1.50 s, confidence 0.90, lookahead 80 ms, final after 250 ms" in shown
    assert display._text.plain == "", "the hypothesis is gone once it is final"


def test_an_empty_final_shows_nothing() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    display = LiveDisplay(None, console)
    display.final(Final("", (), 0.0, 0.0, 5.0, 0.0, 5.0, 0.0, 0.0, 0, "no_speech", (), TIMING), None)
    display.close()
    assert "confidence" not in out.getvalue()


def test_the_summary_says_only_what_is_known() -> None:
    assert Summary(seconds=1.0).sentence() == "1.0 s of audio"
    full = Summary(0.5, [0.2, 0.4], [40.0, 80.0], ["a"], 3.0, 2)
    assert full.sentence() == (
        "3.0 s of audio, first partial after 500 ms, finals after 300 ms,"
        " mean lookahead 60 ms, 2 reconnections"
    )


class FakeDevice(types.ModuleType):
    """As much of `sounddevice` as is used; `InputStream` hands two blocks to its callback at once."""

    class PortAudioError(Exception):
        pass

    def __init__(self, rate: float) -> None:
        super().__init__("sounddevice")
        self.rate = rate
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: str | None, kind: str) -> dict[str, float]:
        if device == "none":
            raise ValueError("No input device matching 'none'")
        return {"default_samplerate": self.rate}

    def InputStream(self, callback: Callable[..., None], **options: Any) -> Any:
        self.opened = options
        stream = io.BytesIO()  # any context manager
        for value in (0.25, 0.5):
            callback(np.full((options["blocksize"], 1), value, np.float32), options["blocksize"], None, None)
        return stream


@pytest.mark.parametrize(("native", "used"), [(44100.0, 44100), (96000.0, 48000)])
async def test_a_microphone_gives_mono_blocks_at_a_rate_that_servers_take(
    monkeypatch: pytest.MonkeyPatch, native: float, used: int
) -> None:
    device = FakeDevice(native)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    source = audio.from_microphone(0.02)
    assert (source.sample_rate, source.live) == (used, True)
    first, second = await anext(source.blocks), await anext(source.blocks)
    assert (len(first), float(first[0]), float(second[0])) == (used // 50, 0.25, 0.5)
    assert device.opened["channels"] == 1


def test_a_missing_microphone_or_library_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevice(16000.0))
    with pytest.raises(CommandError, match="no microphone"):
        audio.from_microphone(0.02, "none")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    done = run("transcribe", "--mic")
    assert done.code == 1
    assert "--mic needs PortAudio and `pip install realtide[mic]`" in done.err


def test_the_demo_serves_streams_and_measures(
    run: Run, process: Process, bundle: object, recording: object
) -> None:
    done = run("demo", recording)
    assert (done.code, done.err) == (0, "")
    assert "Serving bursts on 127.0.0.1:" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert any(line[2:] == ["burst1", "…"] for line in lines), "a partial with the time it came"
    assert "\nburst1 burst2 burst1\n" in done.out
    figure = {
        name: value for name, _, value in (line.strip().partition("  ") for line in done.out.splitlines())
    }
    assert figure["audio received, s"].strip() == "2.3"
    assert figure["slots leaked"].strip() == "0"
    assert figure["mean lookahead"].strip() == "80 ms"
    assert "mean step (each stage), s" in figure


def test_the_demo_shows_both_engines_of_one_server(
    run: Run, process: Process, bundle: Path, video_bundle: Path, recording: Path
) -> None:
    done = run("demo", recording, "--out", "made")
    assert (done.code, done.err) == (0, "")
    assert "Serving bursts and clips on 127.0.0.1:" in done.out
    assert "\nburst1 burst2 burst1\n" in done.out
    story = [line for line in done.out.splitlines() if "a red apple" in line]
    assert "0.00 s  a red apple moves to the right" in story[0]
    assert "asking for: a red apple moves up" in story[1]
    assert "s  a red apple moves up" in story[2]
    assert float(story[1].split()[0]) < float(story[2].split()[0]) < 6
    figure = {
        name: value.strip()
        for name, _, value in (line.strip().partition("  ") for line in done.out.splitlines())
    }
    assert re.fullmatch(r"\d+ / \d+ / \d+", figure["frames/s denoised / decoded / delivered"])
    assert figure["of that, recaching"] == "25 ms"
    assert figure["frames delivered"] == "96"
    assert figure["slots leaked"] == "0"
    assert float(figure["prompt to first frame inside the server, s"]) > 0
    with av.open("made/clip.mp4") as container:
        assert len(list(container.decode(video=0))) == 96
    with Image.open("made/clip.png") as sheet:
        assert sheet.format == "PNG"


def test_the_demo_with_a_video_bundle_alone_needs_no_recording(
    run: Run, process: Process, video_bundle: Path
) -> None:
    done = run("demo")
    assert (done.code, done.err) == (0, "")
    assert "Streaming" not in done.out
    place = re.search(r"The clip: (\S+/clip\.mp4)", done.out)
    assert place is not None
    clip = Path(place[1])
    assert clip.stat().st_size > 1000
    shutil.rmtree(clip.parent)


def test_the_demo_without_any_bundle_says_so(run: Run) -> None:
    done = run("demo")
    assert (done.code, done.out) == (1, "")
    assert "there is no speech bundle" in done.err


def test_figures_are_read_from_an_exposition() -> None:
    text = (
        "# TYPE realtide_audio_seconds counter\n"
        'realtide_audio_seconds_total{model="a"} 2\nrealtide_audio_seconds_total{model="b"} 3\n'
        "# TYPE realtide_step_seconds histogram\n"
        'realtide_step_seconds_bucket{le="+Inf"} 4\n'
        "realtide_step_seconds_sum 1\nrealtide_step_seconds_count 4\n"
    )
    found = dict(figures(text))
    assert found["audio received, s"] == "5"
    assert found["mean step (each stage), s"] == "0.2500"
