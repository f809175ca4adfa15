"""What holds for the repository as a whole: contract, stubs, packaging."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import realtide
import realtide_client
from realtide_client.v1 import common_pb2, image_pb2, models_pb2, speech_pb2, video_pb2
from tools import generate_stubs

ROOT = Path(__file__).resolve().parents[1]
CLIENT = ROOT / "clients" / "python"


def project(directory: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((directory / "pyproject.toml").read_text())["project"]
    return table


def bound(directory: Path, name: str) -> tuple[int, ...]:
    """Lowest version of a dependency that the project accepts."""
    for line in project(directory)["dependencies"]:
        if match := re.fullmatch(rf"{name}>=([\d.]+)", line):
            return tuple(map(int, match[1].split(".")))
    raise AssertionError(f"{directory} does not depend on {name}")


def test_stubs_are_up_to_date() -> None:
    assert generate_stubs.main(["--check"]) == 0


def test_stale_missing_and_left_over_stubs_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(generate_stubs.STUBS, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "speech_pb2.pyi").open("a") as file:
        file.write("# changed\n")
    (tmp_path / "models_pb2.py").unlink()
    (tmp_path / "zither_pb2.py").touch()
    assert generate_stubs.main(["--check", "--out", str(tmp_path)]) == 1
    stale = capsys.readouterr().err.partition(": ")[2].split()
    assert stale == ["models_pb2.py,", "speech_pb2.pyi,", "zither_pb2.py"]


def test_stubs_run_on_the_lowest_versions_that_the_packages_accept() -> None:
    text = (CLIENT / "realtide_client" / "v1" / "speech_pb2.py").read_text()
    match = re.search(r"Domain\.PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+)", text)
    assert match is not None
    protobuf = tuple(map(int, match.groups()))
    text = (CLIENT / "realtide_client" / "v1" / "speech_pb2_grpc.py").read_text()
    match = re.search(r"GRPC_GENERATED_VERSION = '(\d+)\.(\d+)\.(\d+)'", text)
    assert match is not None
    grpcio = tuple(map(int, match.groups()))
    for directory in (ROOT, CLIENT):
        assert bound(directory, "protobuf") >= protobuf
        assert bound(directory, "grpcio") >= grpcio


def test_the_contract_passes_lint_and_is_formatted() -> None:
    buf = Path(sys.executable).with_name("buf")
    for command in (["lint"], ["format", "--diff", "--exit-code"]):
        done = subprocess.run([buf, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_stream_follows_one_grammar() -> None:
    """Numbers of the oneof in requests and responses, for every service with a bidirectional stream."""
    kinds = {"open": 1, "resume": 2, "control": 3, "credit": 5, "checkpoint_request": 6, "finish": 7}
    answers = {"opened": 1, "accepted": 2, "applied": 3, "checkpoint": 4, "going_away": 5}
    shared = {
        "resume": "Resume",
        "credit": "Credit",
        "checkpoint_request": "CheckpointRequest",
        "finish": "Finish",
        "accepted": "ControlAccepted",
        "applied": "ControlApplied",
        "checkpoint": "Checkpoint",
        "going_away": "GoingAway",
    }
    streams = [
        method
        for file in (common_pb2, image_pb2, models_pb2, speech_pb2, video_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.client_streaming
    ]
    assert [method.full_name for method in streams] == [
        "realtide.v1.Image.Stream",
        "realtide.v1.Speech.Stream",
        "realtide.v1.Video.Stream",
    ]
    for method in streams:
        assert method.server_streaming
        for message, numbers in ((method.input_type, kinds), (method.output_type, answers)):
            fields = {field.name: field for field in message.oneofs_by_name["message"].fields}
            assert set(fields) >= set(numbers) - {"credit"}
            for name, field in fields.items():
                if name in numbers:
                    assert field.number == numbers[name], field.full_name
                else:
                    assert field.number == 4 or field.number >= 10, field.full_name
                if name in shared:
                    assert field.message_type.name == shared[name]


def test_server_and_client_have_one_version() -> None:
    assert realtide.__version__ == realtide_client.__version__


def test_the_extras_are_there_and_serving_depends_on_no_framework() -> None:
    table = project(ROOT)
    assert set(table["optional-dependencies"]) == {
        "cpu", "gpu", "export", "train", "dev", "images", "ops", "mic", "torchaudio", "trt", "trt-rtx",
        "synthesis",
    }  # fmt: skip
    served = [*table["dependencies"], *table["optional-dependencies"]["cpu"]]
    assert not [line for line in served if re.match(r"torch|tensorrt|onnxscript|scipy", line)]
    for extra in ("export", "train"):
        assert "torch>=2.11,<2.14" in table["optional-dependencies"][extra]


def test_the_client_needs_nothing_that_the_server_does_not_have() -> None:
    names = {re.split(r"[<>=]", line)[0] for line in project(ROOT)["dependencies"]}
    assert {re.split(r"[<>=]", line)[0] for line in project(CLIENT)["dependencies"]} <= names


def test_the_command_line_starts_light() -> None:
    """`realtide --help` must not wait for numpy, gRPC and the like."""
    code = (
        "import sys, realtide.cli.main\n"
        "heavy = {'numpy', 'grpc', 'onnxruntime', 'soundfile', 'pydantic_settings', 'sentencepiece'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
