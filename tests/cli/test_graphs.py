"""`realtide models export`, `build`, `inspect` and `plans`, on the bundles below models/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realtide import variants
from realtide.bundle import load_bundle, load_manifest
from realtide.engines.runtime import golden
from realtide.precision_scores import identity
from tests.cli.conftest import ROOT, Run

SPEECH = str(ROOT / "models" / "ancat-commands-en")


@pytest.fixture
def joiner(tmp_path: Path) -> Path:
    """A bundle with the speech bundle's joiner alone: small, and TensorRT has all that it needs."""
    import yaml

    directory = tmp_path / "joiner"
    directory.mkdir()
    values: dict[str, Any] = yaml.safe_load((Path(SPEECH) / "manifest.yaml").read_text())
    values["name"], values["precisions"] = "joiner", ["float32"]
    values["programs"] = {"joiner": {"float32": "onnx/joiner.onnx"}}
    (directory / "manifest.yaml").write_text(yaml.safe_dump(values))
    for name in ("onnx", "weights.safetensors"):
        (directory / name).symlink_to(Path(SPEECH) / name)
    return directory


def test_export_writes_graphs_and_a_report(run: Run, tmp_path: Path) -> None:
    done = run("models", "export", SPEECH, "--precision", "fp16")
    assert (done.code, done.err) == (0, "")
    titles, encoder, static, joiner, work, last = done.out.splitlines()
    assert titles.split()[:5] == ["PROGRAM", "GRAPH", "RECORDED", "WORST", "OUTPUT"]
    assert titles.split()[5:] == ["REL", "L2", "MAX", "ABS", "PEAK"]
    assert encoder.split()[:2] == ["encoder", "narrowed"]
    assert static.split()[:2] == ["encoder_static", "narrowed"]
    assert joiner.split()[:4] == ["joiner", "narrowed", "8", "log_probs"]
    assert work == "recorded work: 8 recordings, up to 10 s of each, transcribed together"
    assert last == "3 graphs and report.json in ancat-commands-en-fp16"
    report = json.loads((tmp_path / "ancat-commands-en-fp16" / "report.json").read_text())
    assert (report["precision"], report["within"]) == ("float16", True)
    again = run("models", "export", SPEECH, "--precision", "fp16", "--out", "other", "--json")
    assert json.loads(again.out) == report


def test_export_says_what_is_not_measured(run: Run) -> None:
    skipped = run("models", "export", SPEECH, "--precision", "fp16", "--no-measure", "--json")
    assert {row["not_measured"] for row in json.loads(skipped.out)["programs"]} == {"as asked"}


def test_export_tells_the_scores_of_these_weights(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    call = (
        "models",
        "export",
        SPEECH,
        "--precision",
        "fp16",
        "--no-measure",
        "--json",
        "--scores",
        str(file),
    )
    assert (run(*call).code, run(*call).err) == (2, f"realtide: scores: there is no file {file}\n")
    scores = {"float32": {"rate": 0.1}, "float16": {"rate": 0.2}, "int8": {"rate": 0.3}}
    entry = identity(load_bundle(SPEECH)) | {"scores": scores}
    golden = {"longlive": {"float16": {"case": {"worst": 0.1}}}}
    file.write_text(json.dumps({"bundles": {"ancat-commands-en": entry}, "golden": golden}))
    assert json.loads(run(*call).out)["golden"].startswith("there are no golden cases of ancat: ")
    assert json.loads(run(*call).out)["scores"] == {"float32": {"rate": 0.1}, "float16": {"rate": 0.2}}
    file.write_text(
        json.dumps({"bundles": {"ancat-commands-en": entry | {"version": "9.9.9"}}, "golden": {}})
    )
    told = json.loads(run(*call).out)["scores"]
    assert told.startswith("not measured for these weights in float16: needs the data of models/")
    file.write_text("[]")
    done = run(*call)
    assert (done.code, "holds no scores of precisions" in done.err) == (1, True)


def test_recordings_can_be_named(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "one.flac").symlink_to(ROOT / "tests" / "data" / "audio" / "digit-three.flac")
    done = run("models", "export", SPEECH, "--precision", "fp16", "--recordings", str(own), "--json")
    assert json.loads(done.out)["recorded_work"].startswith("1 recordings, ")
    (own / "one.flac").unlink()
    done = run("models", "export", SPEECH, "--precision", "fp16", "--recordings", str(own))
    told = f"recordings: must be a directory with .flac, .wav, .ogg files, not {own}"
    assert (done.code, done.err) == (1, f"realtide: {told}\n")
    video = str(ROOT / "models" / "longlive-emoji")
    done = run("models", "export", video, "--precision", "fp16", "--recordings", str(own))
    told = "recordings: are for speech bundles, longlive-emoji is none"
    assert (done.code, told in done.err) == (2, True)


def test_export_replays_golden_cases_and_fails_above_their_bound(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, own = str(ROOT / "models" / "longlive-emoji"), tmp_path / "own"
    own.mkdir()
    for path in (ROOT / "tests" / "golden" / "longlive").glob("umt5_*"):
        (own / path.name).symlink_to(path)
    command = ("models", "export", video, "--precision", "fp16", "--no-measure", "--goldens", str(own))
    done = run(*command, "--json")
    assert (done.code, done.err) == (0, "")
    assert list(json.loads(done.out)["golden"]) == ["umt5_seed41"]
    monkeypatch.setitem(golden.NARROW, "float16", 1e-6)
    done = run(*command)
    told = "golden cases further from their reference than allowed: umt5_seed41"
    assert (done.code, done.err) == (1, f"realtide: {told}\n")
    done = run(*command[:-1], str(tmp_path))
    assert (done.code, "goldens: must be a directory with golden cases of longlive" in done.err) == (1, True)


def test_export_fails_where_the_report_is_out_of_bounds(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.BOUNDS, "float16", 1e-6)
    done = run("models", "export", SPEECH, "--precision", "fp16")
    assert (done.code, done.err) == (
        1,
        "realtide: further from float32 than 1e-06: encoder, encoder_static, joiner\n",
    )


def test_precisions_that_cannot_be_had_are_refused(run: Run) -> None:
    for command in ("export", "build"):
        done = run("models", command, SPEECH, "--precision", "fp8")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert done.err.startswith("realtide: ancat-commands-en: fp8 is for video and images: the products")
    video = str(ROOT / "models" / "longlive-emoji")
    done = run("models", "build", video, "--precision", "fp8", "--gpu", "8.6")
    assert (done.code, "compute capability 8.9 or more" in done.err) == (1, True)
    done = run("models", "build", SPEECH, "--precision", "int8")
    assert (done.code, "int8 graphs are for ONNX Runtime on a CPU" in done.err) == (2, True)


def test_plans_are_built_listed_inspected_and_removed(run: Run, joiner: Path, tmp_path: Path) -> None:
    cache = tmp_path / "plans"
    command = ("models", "build", str(joiner), "--cache", str(cache))
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].split()[:2] == ["joiner", "built"]
    assert done.out.splitlines()[2] == f"1 of 1 plans in {cache}"
    again = json.loads(run(*command, "--json").out)
    (row,) = again["plans"]
    assert (row["built"], row["problem"], row["key"]["precision"]) == (False, "", "float16")
    other = json.loads(run(*command, "--max-batch", "2", "--gpu", "8.9", "--json").out)["plans"][0]
    assert (other["built"], other["key"]["capability"]) == (True, "8.9")
    frames = load_manifest(joiner).architecture["step_frames"]
    assert other["key"]["profile"] == f"rows=1:2:{2 * frames}"

    (listed, _) = sorted(json.loads(run("models", "plans", "list", "--cache", str(cache), "--json").out),
                         key=lambda plan: bool(plan["key"]["capability"] != "any"))  # fmt: skip
    assert listed["subject"] == "joiner/joiner/float16"
    assert listed["key"] == row["key"]
    table = run("models", "plans", "list", "--cache", str(cache)).out
    assert "joiner/joiner/float16" in table
    assert "2 plans in" in table
    inspected = run("models", "inspect", listed["file"], "--json")
    assert json.loads(inspected.out)["key"] == row["key"]
    assert f"digest:     {row['digest']}" in run("models", "inspect", listed["file"]).out

    cache.chmod(0o777)
    done = run("models", "plans", "list", "--cache", str(cache))
    assert (done.code, "has mode 0777" in done.err) == (1, True)
    done = run(*command)
    assert (done.code, "has mode 0777" in done.err) == (1, True)
    cache.chmod(0o700)
    name = Path(listed["file"]).name
    assert run("models", "plans", "remove", name, "--cache", str(cache)).out == f"removed {name}\n"
    assert run("models", "plans", "remove", "--all", "--cache", str(cache)).code == 0
    assert json.loads(run("models", "plans", "list", "--cache", str(cache), "--json").out) == []
    done = run("models", "plans", "remove", name, "--cache", str(cache))
    assert (done.code, f"there is no plan {name}" in done.err) == (1, True)
    assert run("models", "plans", "remove", "--cache", str(cache)).code == 2


def test_what_tensorrt_lacks_is_named_and_the_rest_is_built(run: Run, joiner: Path, tmp_path: Path) -> None:
    import onnx
    import yaml

    values = yaml.safe_load((joiner / "manifest.yaml").read_text())
    values["programs"]["odd"] = {"float32": "odd.onnx"}
    values["files"].append({"path": "odd.onnx", "size": 0, "sha256": "0" * 64})
    (joiner / "manifest.yaml").write_text(yaml.safe_dump(values))
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4])
    found = onnx.helper.make_tensor_value_info("found", onnx.TensorProto.INT64, [1, "n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("NonZero", ["x"], ["found"])], "odd", [x], [found])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), joiner / "odd.onnx"
    )
    done = run("models", "build", str(joiner), "--cache", str(tmp_path / "plans"))
    assert done.code == 1
    assert done.err.startswith("realtide: odd: ")
    assert "NonZero" in done.err
    assert done.out.splitlines()[-1].startswith("1 of 2 plans in ")


def test_targets_that_cannot_be_built_for_are_refused(run: Run, joiner: Path, tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "plans"))
    done = run("models", "build", str(joiner), "--gpu", "H100", *cache)
    assert (done.code, "gpu: compute capability must be like 9.0" in done.err) == (2, True)
    done = run("models", "build", str(joiner), "--gpu", "9.0", *cache)
    assert (done.code, "builds for compute capabilities" in done.err) == (1, True)


def test_graphs_are_described(run: Run) -> None:
    graph = str(Path(SPEECH) / "onnx" / "joiner.onnx")
    (row,) = json.loads(run("models", "inspect", graph, "--json").out)
    assert row["inputs"] == [
        {"name": "encoded", "dtype": "float32", "shape": ["rows", 160]},
        {"name": "contexts", "dtype": "int64", "shape": ["rows", 2]},
    ]
    assert row["opsets"] == {"ai.onnx": 20}
    assert sum(row["operators"].values()) == row["nodes"] > 5
    import onnx

    model = onnx.load(graph, load_external_data=False)
    assert row["nodes"] == len(model.graph.node)
    values = [1]
    for tensor in model.graph.initializer:
        if tensor.external_data:
            count = 1
            for dim in tensor.dims:
                count *= dim
            values.append(4 * count)
    assert row["weights"] == {"tensors": len(values) - 1, "bytes": sum(values) - 1}

    rows = json.loads(run("models", "inspect", SPEECH, "--json").out)
    assert {(row["program"], row["precision"]) for row in rows} == {
        (program, precision)
        for program in ("encoder", "encoder_static", "joiner")
        for precision in ("float32", "int8")
    }  # fmt: skip
    table = run("models", "inspect", SPEECH).out
    assert "encoded float32[rows, 160]" in table
    assert "50 tensors" in table
    for wrong in ("nothing.onnx", "nothing.plan"):
        assert run("models", "inspect", wrong).code == 1
    done = run("models", "inspect", str(Path(SPEECH) / "weights.safetensors"))
    assert done.code == 1
