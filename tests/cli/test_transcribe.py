"""`realtide transcribe` against real servers."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.cli.conftest import Process, Run

TEXTS = ["burst1 burst2", "burst1"]


def objects(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


def finals(output: str) -> list[str]:
    return [str(one["text"]) for one in objects(output) if one["type"] == "final" and one["text"]]


def test_json_has_partials_and_finals_with_words_times_and_lookahead(
    run: Run, address: str, recording: Path
) -> None:
    done = run("transcribe", recording, "--server", address, "--json")
    assert (done.code, done.err) == (0, "")
    lines = objects(done.out)
    assert {line["type"] for line in lines} == {"partial", "final"}
    assert finals(done.out) == TEXTS
    final = next(line for line in lines if line["type"] == "final")
    assert final["reason"] == "endpoint"
    assert final["lookahead_mean_ms"] == 80.0
    assert final["words"] == [
        {"text": "burst1", "start": 0.2, "end": 0.4, "confidence": 0.9, "lookahead_ms": 80.0},
        {"text": "burst2", "start": 0.6, "end": 0.8, "confidence": 0.9, "lookahead_ms": 80.0},
    ]
    assert final["speech_end"] == 0.8
    assert final["delay_seconds"] is None, "not paced like speech"
    first = next(line for line in lines if line["text"])
    assert (first["type"], first["text"], first["stability"]) == ("partial", "burst1", 0.5)


def test_without_interim_results_there_are_only_finals(run: Run, address: str, recording: Path) -> None:
    done = run("transcribe", recording, "--server", address, "--json", "--no-interim")
    assert {line["type"] for line in objects(done.out)} == {"final"}


def test_a_pipe_gets_the_text_only_and_figures_go_to_standard_error(
    run: Run, address: str, recording: Path
) -> None:
    done = run("transcribe", recording, "--server", address, "--pace", "--stats")
    assert done.out.splitlines() == TEXTS
    figures = done.err
    assert figures.startswith("2.3 s of audio, first partial after ")
    assert "finals after " in figures
    assert "mean lookahead 80 ms" in figures


def test_paced_results_have_their_delay_and_come_while_audio_is_sent(
    run: Run, address: str, recording: Path
) -> None:
    done = run("transcribe", recording, "--server", address, "--pace", "--json")
    lines = objects(done.out)
    assert finals(done.out) == TEXTS
    final = next(line for line in lines if line["type"] == "final")
    # The utterance is cut 0.8 s after its last word, so its final cannot come sooner when audio is paced.
    assert isinstance(final["delay_seconds"], float)
    assert final["delay_seconds"] >= 0.75


@pytest.mark.parametrize("encoding", ["raw", "raw float", "wav", "endless wav", "24-bit wav", "flac"])
def test_standard_input_is_recognized_in_every_form(
    run: Run, address: str, recording: Path, tmp_path: Path, encoding: str
) -> None:
    samples, rate = soundfile.read(recording, dtype="int16")
    extra: list[str] = []
    if encoding == "raw":
        data = samples.tobytes()
    elif encoding == "raw float":
        data = (samples.astype("<f4") / 32768).tobytes()
        extra = ["--format", "f32le", "--rate", "16000"]
    elif encoding in ("wav", "endless wav"):
        data = recording.read_bytes()
        if "endless" in encoding:
            data = data[:40] + b"\xff\xff\xff\xff" + data[44:]
    else:
        kind = ("x.flac", "PCM_16") if encoding == "flac" else ("x.wav", "PCM_24")
        soundfile.write(tmp_path / kind[0], samples, rate, subtype=kind[1])
        data = (tmp_path / kind[0]).read_bytes()
    done = run("transcribe", "-", "--server", address, "--json", *extra, stdin=data)
    assert done.err == ""
    assert finals(done.out) == TEXTS


def test_stereo_at_another_rate_is_mixed(run: Run, address: str, tmp_path: Path) -> None:
    tone = (0.4 * np.sin(np.arange(9600) / 10)).astype(np.float32)
    both = np.stack([np.zeros_like(tone), tone], axis=1)
    soundfile.write(tmp_path / "stereo.flac", both, 48000)
    done = run("transcribe", "stereo.flac", "--server", address, "--json")
    assert finals(done.out) == ["burst1"]


def test_without_a_server_one_is_started_and_stopped(
    run: Run, process: Process, bundle: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REALTIDE_PORT", "1")  # meant for another server
    done = run("transcribe", recording)
    assert (done.code, done.out.splitlines()) == (0, TEXTS)
    assert done.err == ""
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(bundle) not in left, "its server must not outlive the command"


def test_terminating_stops_the_own_server_too(process: Process, bundle: Path, recording: Path) -> None:
    with subprocess.Popen(
        process.line("transcribe", str(recording), "--json"), stdout=subprocess.PIPE, env=process.environment
    ) as command:
        try:
            assert command.stdout is not None
            assert command.stdout.readline()  # its server serves
            command.terminate()
            command.stdout.read()
            assert command.wait(60) == 128 + signal.SIGTERM
        finally:
            command.kill()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(bundle) not in left


def test_interrupting_ends_the_audio_and_still_gives_the_last_words(
    process: Process, address: str, recording: Path
) -> None:
    samples, _ = soundfile.read(recording, dtype="int16")
    with subprocess.Popen(
        process.line("transcribe", "-", "--server", address, "--json"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=process.environment,
    ) as command:
        try:
            assert command.stdin is not None
            assert command.stdout is not None
            command.stdin.write(samples[:8000].tobytes())
            command.stdin.flush()
            assert json.loads(command.stdout.readline())["text"] == "burst1"
            command.send_signal(signal.SIGINT)
            rest = command.stdout.read()  # our end of the other pipe stays open all the while
            assert command.wait(60) == 0
        finally:
            command.kill()
    assert finals(rest.decode()) == ["burst1"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["missing.wav"], 1, "there is no file missing.wav"),
        (["."], 1, "is a directory"),
        (["noise.txt"], 1, "cannot be read as audio"),
        (["-", "--format", "mp3"], 2, "--format must be one of s16le, f32le"),
        ([], 2, "give either a file"),
        (["a.wav", "--mic"], 2, "give either a file"),
        (["a.wav", "--boost-weight", "2"], 2, "--boost-weight needs --boost"),
        (["a.wav", "--server", "h:1", "--bundle", "b"], 2, "--bundle is for the own server"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(
    run: Run, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "noise.txt").write_text("this is not audio" * 100)
    done = run("transcribe", *arguments)
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_the_servers_refusals_are_passed_on_with_their_fields(
    run: Run, address: str, recording: Path
) -> None:
    done = run("transcribe", recording, "--server", address, "--beam", "99")
    assert done.code == 1
    assert "open.options.beam" in done.err
    assert len(done.err.splitlines()) == 1
    done = run("transcribe", recording, "--server", address, "--model", "other")
    assert done.code == 1
    assert "other" in done.err


def test_no_bundle_and_no_server_is_said(run: Run, recording: Path, tmp_path: Path) -> None:
    done = run("transcribe", recording, "--bundle", "none-such")
    assert done.code == 1
    assert "there is no bundle 'none-such'" in done.err


def test_a_server_that_does_not_start_gives_its_reason(
    run: Run, process: Process, recording: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.yaml").write_text("engine: bursts\n")
    done = run("transcribe", recording, "--bundle", broken)
    assert done.code == 1
    assert done.err.strip() == "realtide: the server did not start: this bundle is broken"


def test_a_pipe_cut_within_a_sample_gives_what_was_whole(run: Run, address: str, recording: Path) -> None:
    samples, _ = soundfile.read(recording, dtype="int16")
    done = run("transcribe", "-", "--server", address, stdin=samples.tobytes() + b"x")
    assert (done.code, done.out.splitlines()) == (0, TEXTS)
    done = run("transcribe", "-", "--server", address, stdin=b"x")
    assert done.code == 1
    assert "not a sample" in done.err


def test_a_wav_pipe_without_samples_is_an_error(run: Run, address: str, recording: Path) -> None:
    done = run("transcribe", "-", "--server", address, stdin=recording.read_bytes()[:40])
    assert (done.code, done.err) == (1, "realtide: standard input is a WAV file without samples\n")
