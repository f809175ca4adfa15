"""`realtide video` against real servers with the clip engine, whose frames' colours say what they show."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from realtide.cli.preview import LineEditor, picture
from realtide.cli.sheet import contact_sheet
from realtide.cli.video_out import yuv444
from tests.cli.conftest import Process, Run
from tests.server.video_engine import BLOCK, FIRST_BLOCK, SIZES, colour

WIDTH, HEIGHT = SIZES[0]


def objects(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def clip(length: int, seed: int, *changes: tuple[int, str]) -> list[tuple[int, int, int]]:
    """Colours of the frames with these prompts by first frame."""
    prompts = [max(change for change in changes if change[0] <= index)[1] for index in range(length)]
    return [colour(index, prompt, seed) for index, prompt in enumerate(prompts)]


def shown(path: Path) -> list[tuple[int, int, int]]:
    """Colours of a file of raw pixels."""
    frames = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, HEIGHT * WIDTH, 3)
    assert (frames == frames[:, :1]).all(), "flat"
    return [(int(red), int(green), int(blue)) for red, green, blue in frames[:, 0]]


def film(path: Path) -> list[np.ndarray[Any, Any]]:
    """Every frame of a file that a player takes."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def near(frame: np.ndarray[Any, Any], wanted: tuple[int, int, int]) -> bool:
    return bool((abs(frame.reshape(-1, 3).mean(0) - wanted) < 6).all())


def test_pixels_are_those_of_the_prompts_at_their_times(run: Run, video_address: str) -> None:
    done = run(
        "video", "--prompt", "a cat", "--at", "0.5", "a dog", "--at", "1.25", "a fish", "--seconds", "2",
        "--seed", "7", "--out", "clip.rgb", "--server", video_address, "--stats",
    )  # fmt: skip
    assert done.code == 0
    # 16 frames a second; blocks begin at 3, 7, 11, ...
    assert shown(Path("clip.rgb")) == clip(32, 7, (0, "a cat"), (11, "a dog"), (23, "a fish"))
    assert done.out == ""
    assert "clips: 32x16, 16 frames/s, seed 7" in done.err
    assert re.search(r"0\.69 s  a dog \(recached in 25 ms\)", done.err)
    figures = done.err.splitlines()[-1]
    assert figures.startswith("32 frames, ")
    assert "new prompt at frame 11, recached in 25 ms, seen " in figures
    assert "first frame after " in figures


def test_mp4_is_written_as_it_comes_and_plays(run: Run, video_address: str) -> None:
    done = run(
        "video", "-p", "a cat", "--at", "1", "a dog", "--frames", "40", "--seed", "200", "--out", "a.mp4",
        "--sheet", "a.png", "--server", video_address,
    )  # fmt: skip
    assert done.code == 0, done.err
    frames, wanted = film(Path("a.mp4")), clip(40, 200, (0, "a cat"), (19, "a dog"))
    assert len(frames) == 40
    assert all(near(frame, one) for frame, one in zip(frames, wanted, strict=True))
    with Image.open("a.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 8 * WIDTH


def test_a_pipe_gets_the_same_file(process: Process, video_address: str, tmp_path: Path) -> None:
    line = process.line("video", "-p", "a cat", "--frames", "20", "--out", "-", "--server", video_address)
    done = subprocess.run(line, env=process.environment, capture_output=True, check=True)
    (tmp_path / "pipe.mp4").write_bytes(done.stdout)
    assert len(film(tmp_path / "pipe.mp4")) == 20


def test_a_reader_that_leaves_the_pipe_ends_the_command(process: Process, video_address: str) -> None:
    line = process.line("video", "-p", "a cat", "--endless", "--out", "-", "--server", video_address)
    with subprocess.Popen(
        line, env=process.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert len(command.stdout.read(2000)) == 2000
        command.stdout.close()
        words = command.stderr.read().decode()
        assert command.wait(60) == 1
    assert words.splitlines()[-1] == "realtide: the pipe was closed by its reader"


@pytest.mark.parametrize("out", ["images/", "images/f-%03d.jpg"])
def test_images_are_numbered_like_their_frames(run: Run, video_address: str, out: str) -> None:
    Path("images").mkdir()
    done = run(
        "video", "-p", "a cat", "--frames", "9", "--seed", "1", "--out", out, "--quality", "100",
        "--server", video_address,
    )  # fmt: skip
    assert done.code == 0, done.err
    files = sorted(Path("images").iterdir())
    names = [f"f-{n:03d}.jpg" if "%" in out else f"{n:06d}.jpg" for n in range(9)]
    assert [file.name for file in files] == names
    for file, wanted in zip(files, clip(9, 1, (0, "a cat")), strict=True):
        assert near(np.asarray(Image.open(file)), wanted)


def test_y4m_is_what_players_take(run: Run, video_address: str) -> None:
    done = run(
        "video", "-p", "a cat", "--frames", "9", "--seed", "1", "--fps", "12.5", "--out", "a.y4m",
        "--server", video_address,
    )  # fmt: skip
    assert done.code == 0, done.err
    with av.open("a.y4m") as container:
        assert container.streams.video[0].average_rate == 12.5
    for frame, wanted in zip(film(Path("a.y4m")), clip(9, 1, (0, "a cat")), strict=True):
        assert near(frame, wanted)
    white = yuv444(np.full((1, 1, 3), 255, np.uint8))
    assert white.ravel().tolist() == [235, 128, 128]


def test_json_tells_what_was_negotiated_what_came_and_the_figures(run: Run, video_address: str) -> None:
    done = run(
        "video", "-p", "a cat", "--at", "1", "a dog", "--seconds", "2", "--seed", "7", "--json",
        "--server", video_address,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    lines = objects(done.out)
    assert [line["type"] for line in lines if line["type"] != "frames"] == [
        "opened", "prompt_applied", "prompt_applied", "done"
    ]  # fmt: skip
    opened = lines[0]
    assert (opened["seed"], opened["width"], opened["length_frames"]) == (7, WIDTH, 32)
    change = [line for line in lines if line["type"] == "prompt_applied"][1]
    assert change == {
        "type": "prompt_applied",
        "prompt": "a dog",
        "first_frame": 19,
        "recache_seconds": 0.025,
        "recached_latent_frames": 2,
    }
    assert lines[lines.index(change) + 1]["position"] == 19, "right before the first frame that it concerns"
    assert sum(line["count"] for line in lines if line["type"] == "frames") == 32
    last = lines[-1]
    assert last["frames"] == 32
    assert last["fps"]["delivered"] > 0
    assert last["fps"]["denoised"] is None, "only the server knows"
    assert [switch["first_frame"] for switch in last["switches"]] == [19]
    assert last["switches"][0]["after_frame_before_seconds"] > 0


def test_paced_frames_come_when_they_are_played(run: Run, video_address: str) -> None:
    done = run("video", "-p", "a", "--frames", "24", "--pace", "--json", "--server", video_address)
    # 23 frames lie between the first and the last one; they arrive up to the buffer before they are played.
    began = time.monotonic()
    slow = run(
        "video", "-p", "a", "--frames", "24", "--pace", "--buffer", "0.2", "--json", "--server", video_address
    )
    assert time.monotonic() - began >= 23 / 16
    for one in (done, slow):
        assert one.code == 0
        assert objects(one.out)[-1]["frames"] == 24
    assert objects(slow.out)[-1]["seconds"] >= 23 / 16 - 0.5


def test_without_a_server_one_is_started_with_the_first_video_bundle(
    run: Run, process: Process, bundle: Path, video_bundle: Path
) -> None:
    done = run("video", "-p", "a cat", "--frames", "20", "--seed", "3", "--json", "--out", "a.rgb")
    assert (done.code, done.err) == (0, "")
    last = objects(done.out)[-1]
    assert (last["frames"], last["files"]) == (20, ["a.rgb"])
    assert set(last["fps"]) == {"denoised", "decoded", "delivered"}
    assert min(last["fps"].values()) > 0
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(video_bundle) not in left, "its server must not outlive the command"


def test_speech_is_transcribed_by_the_speech_bundle_beside_it(
    run: Run, process: Process, recording: Path, tmp_path: Path
) -> None:
    for name, engine in (("a-clips", "longlive"), ("bursts", "bursts")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "manifest.yaml").write_text(f"engine: {engine}\nname: {name}\n")
    done = run("transcribe", recording)
    assert done.out.splitlines() == ["burst1 burst2", "burst1"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--out", "a.webm"], 2, "must be .mp4, .y4m, .rgb"),
        (["--out", "a.jpg"], 2, "images need a pattern, a-%05d.jpg, or a directory"),
        (["--out", "nowhere/a.mp4"], 2, "there is no directory nowhere"),
        ([], 2, "give --out"),
        (["--out", "-", "--json"], 2, "cannot go with --json"),
        (["--json", "--interactive"], 2, "cannot go with --interactive"),
        (["--out", "a.rgb", "--sheet", "a.png"], 2, "needs --out FILE.mp4"),
        (["--out", "a.mp4", "--sheet", "nowhere/a.png"], 2, "there is no directory nowhere"),
        (["--out", "a.rgb", "--quality", "3"], 2, "--quality is for JPEG and MP4"),
        (["--out", "a.mp4", "--seconds", "3", "--frames", "3"], 2, "one of --seconds, --frames"),
        (["--out", "a.mp4", "--seconds", "0"], 2, "--seconds 0: must be more than 0"),
        (["--out", "a.mp4", "--seconds", "nan"], 2, "--seconds nan: must be more than 0"),
        (["--out", "a.mp4", "--buffer", "0"], 2, "--buffer 0: must be more than 0"),
        (["--out", "a.mp4", "--at", "-1", "b"], 2, "--at -1: must be more than 0"),
        (["--out", "a.mp4", "--at", "x", "b"], 2, "--at x b: must be a number of seconds and a prompt"),
        (["--out", "a.mp4", "--at", "3"], 2, "--at 3: must be a number of seconds and a prompt"),
        (["--out", "a.mp4", "--at", "2", "b", "--at", "2", "c"], 2, "later than the one before it (2 s)"),
        (["--out", "a.mp4", "--server", "h:1", "--bundle", "b"], 2, "--bundle is for the own server"),
        (["--out", "a.mp4", "--seed", str(1 << 70), "--server", "VIDEO"], 2, "alue out of range"),
        (["--out", "a.mp4", "--at", "11", "b", "--server", "VIDEO"], 2, "the video ends at 10 s"),
        (["--out", "a.mp4", "--model", "other", "--server", "VIDEO"], 1, "has no video model 'other'"),
        (["--out", "a.mp4", "--server", "SPEECH"], 1, "the server has no video model"),
        (["--out", "a.mp4", "--fps", "99", "--server", "VIDEO"], 1, "open.options.frames_per_second"),
        (["--out", "a.mp4", "--width", "99", "--server", "VIDEO"], 1, "must be one of 32x16, 16x16"),
        (["--out", "a.mp4", "--quality", "99", "--server", "VIDEO"], 1, "open.options.h264_crf"),
        (["--out", "a.mp4", "--bundle", "none-such"], 1, "there is no bundle 'none-such'"),
        (["--out", "a.mp4"], 1, "there is no video bundle in models"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence_and_leaves_no_file(
    run: Run, address: str, video_address: str, bundle: Path, arguments: list[str], code: int, sentence: str
) -> None:
    places = {"VIDEO": video_address, "SPEECH": address}
    done = run("video", "--prompt", "a", *(places.get(word, word) for word in arguments))
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("a.mp4").exists()


def test_interrupting_ends_an_endless_video_whose_file_is_whole(process: Process, video_address: str) -> None:
    line = process.line(
        "video", "-p", "a cat", "--endless", "--out", "a.mp4", "--json", "--server", video_address
    )
    with subprocess.Popen(
        line, env=process.environment, stdout=subprocess.PIPE, cwd=process.directory
    ) as command:
        try:
            assert command.stdout is not None
            for _ in range(12):
                command.stdout.readline()
            command.send_signal(signal.SIGINT)
            rest = command.stdout.read().decode()
            assert command.wait(60) == 0
        finally:
            command.kill()
    last = objects(rest)[-1]
    assert last["type"] == "done"
    assert len(film(process.directory / "a.mp4")) == last["frames"] > 10


def test_prompts_from_a_pipe_are_taken_while_it_plays(process: Process, video_address: str) -> None:
    line = process.line(
        "video", "-p", "a cat", "--interactive", "--seed", "4", "--out", "a.rgb", "--server", video_address
    )
    with subprocess.Popen(
        line,
        env=process.environment,
        cwd=process.directory,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as command:
        try:
            assert command.stdin is not None
            assert command.stderr is not None
            heard = b""

            def say(text: str, answer: bytes) -> None:
                nonlocal heard
                assert command.stdin is not None
                assert command.stderr is not None
                command.stdin.write(text.encode() + b"\n")
                while answer not in heard:
                    got = command.stderr.read(1)
                    assert got, heard
                    heard += got

            say("/what", b"must be /pause, /resume or /quit")
            say("a very long prompt of more words than it takes", b"too long: a prompt has at most")
            say("a dog", b" s  a dog (recached")
            say("/pause", b"paused")
            say("/resume", b"")
            say("a fish", b" s  a fish (recached")
            command.stdin.write(b"/quit\n")
            command.stderr.read()
            assert command.wait(60) == 0
        finally:
            command.kill()
    colours = shown(process.directory / "a.rgb")
    greens = list(dict.fromkeys(green for _, green, _ in colours))
    assert greens[:2] == [colour(0, prompt, 4)[1] for prompt in ("a cat", "a dog")]


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, line: list[str], environment: dict[str, str], directory: Path) -> None:
        self.main, self.side = pty.openpty()
        termios.tcsetwinsize(self.main, (20, 60))
        self.before = termios.tcgetattr(self.side)
        self.heard = b""
        self.command = subprocess.Popen(
            line, env=environment, cwd=directory, stdin=self.side, stdout=self.side, stderr=subprocess.PIPE
        )

    def until(self, words: str) -> None:
        """Read what is shown until `words` are; what follows them stays for the next call."""
        end = time.monotonic() + 30
        while words.encode() not in self.heard:
            ready, _, _ = select.select([self.main], [], [], 30)
            assert ready, self.heard[-2000:]
            assert time.monotonic() < end, self.heard[-2000:]
            self.heard += os.read(self.main, 65536)
        self.heard = self.heard.partition(words.encode())[2]

    def type(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def close(self) -> None:
        self.command.kill()
        self.command.communicate()
        os.close(self.main)
        os.close(self.side)


def test_a_terminal_shows_the_video_and_takes_prompts(process: Process, video_address: str) -> None:
    line = process.line("video", "-p", "a cat", "-i", "--seed", "4", "--server", video_address)
    environment = process.environment | {"COLORTERM": "truecolor", "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    environment.pop("LINES", None)
    terminal = Terminal(line, environment, process.directory)
    try:
        terminal.until("\x1b[?1049h")
        red, green, blue = colour(5, "a cat", 4)
        terminal.until(f"\x1b[38;2;{red};{green};{blue};48;2;{red};{green};{blue}m▀▀▀▀")
        terminal.type("a doh\x7fg")
        terminal.until("> a dog")
        terminal.type("\n")
        terminal.until("recached in 25 ms")
        terminal.until(f";{colour(0, 'a dog', 4)[1]};4m▀")
        terminal.type("/pause\n")
        terminal.until("paused; /resume goes on")
        terminal.type("/resume\n")
        terminal.until(";4m▀")
        terminal.type("/quit\n")
        terminal.until("\x1b[?1049l")
        assert terminal.command.wait(60) == 0
        assert termios.tcgetattr(terminal.side) == terminal.before, "left as it was"
    finally:
        terminal.close()


def test_brackets_in_a_prompt_are_shown_as_they_are(run: Run, video_address: str) -> None:
    done = run("video", "-p", "a [red] cat", "--frames", "3", "--out", "a.rgb", "--server", video_address)
    assert "0.00 s  a [red] cat" in done.err


def test_the_line_editor_knows_the_usual_keys() -> None:
    editor = LineEditor()
    assert editor.feed("ä ca".encode()[:1]) == []
    assert editor.feed("ä ca".encode()[1:] + b"r\x7ft\x1b[A\x1b[3~!\n") == ["ä cat!"]
    assert editor.feed(b"gone\x15here\r") == ["here"]
    assert editor.feed(b"x\x04") == []
    assert editor.feed(b"\x15\x04") == ["/quit"]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (16, 40), (200, 3)])
def test_a_picture_keeps_its_shape_and_its_colours(columns: int, lines: int) -> None:
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:20] = (255, 0, 0)
    rows = picture(frame, columns, lines, true_colour=True)
    wide = rows[0].count("▀")
    assert wide <= columns
    assert len(rows) <= lines
    assert wide == pytest.approx(4 * len(rows), abs=4), "80x40 pixels, two in a character"
    assert "38;2;255;0;0;48;2;255;0;0" in rows[0]
    assert "38;2;0;0;0;48;2;0;0;0" in rows[-1]
    few = picture(frame, columns, lines, true_colour=False)
    assert "38;5;196;48;5;196" in few[0]


def test_a_contact_sheet_begins_a_row_for_every_prompt_and_ends_with_the_last_frame() -> None:
    frames = [np.full((64, 64, 3), n, np.uint8) for n in range(100)]
    sheet = contact_sheet(frames, 16.0, {0: "one", 50: "two"}, columns=5, rows=2, height=64)
    pixels = np.asarray(sheet)
    # Rows of pictures lie where neither title nor times are; the middle of each picture has its colour.
    levels = [
        int(pixels[y, 6 + column * 70 + 32, 0])
        for y in (6 + 18 + 32, 6 + 18 + 82 + 18 + 32)
        for column in range(5)
    ]
    assert levels == [0, 12, 24, 37, 49, 50, 62, 74, 87, 99]
    with pytest.raises(ValueError, match="no frames"):
        contact_sheet([], 16.0, {})


def test_blocks_are_those_that_the_times_above_count_on() -> None:
    assert (FIRST_BLOCK, BLOCK) == (3, 4)
