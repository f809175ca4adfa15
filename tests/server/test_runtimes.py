"""Which runtime serves a model: the order, what is passed over and why, and where that is said."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from realtide.bundle import BundleError
from realtide.engines.runtime import gpu
from realtide.engines.runtime.plan_key import Gpu
from realtide.server import runtimes
from realtide.server.app import Server
from realtide.server.config import ConfigError, ModelConfig, ServerConfig, load_config
from realtide.server.loading import Loaded, load_engines
from realtide.server.remote import RemoteEngine
from realtide.server.runtimes import RUNTIMES, Choice, Passed, Runtime, missing
from realtide_client.v1 import models_pb2, models_pb2_grpc
from tests.engines.runtime.tensorrt_package import installed
from tests.server.engine import BurstEngine
from tests.server.helpers import DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT / "models" / "ancat-commands-en"
NO_DRIVER = "there is no NVIDIA driver on this machine"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose presence means that there is a driver; it is there."""
    path = tmp_path / "driver"
    path.touch()
    monkeypatch.setattr(runtimes, "_DRIVER", (path,))
    return path


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_DRIVER", ())


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(runtimes, "_installed", lambda name: name in packages)


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_nothing_runs_on_a_gpu() -> None:
    assert missing("tensorrt", "easycontrol", "fp32") == NO_DRIVER
    assert missing("torch-cuda", "easycontrol", "fp32") == NO_DRIVER
    assert missing("onnxruntime", "easycontrol", "int8") is None
    assert missing("torch-cpu", "ancat", "fp32") is None


@pytest.mark.usefixtures("driver")
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert missing("tensorrt", "ancat", "fp32") == "neither tensorrt nor tensorrt_rtx is installed"
    assert missing("torch-cuda", "easycontrol", "fp32") == "PyTorch is not installed"
    assert missing("torch-cpu", "ancat", "fp32") == "PyTorch is not installed"
    assert missing("onnxruntime", "ancat", "fp32") == "onnxruntime is not installed"
    install(monkeypatch, "torch", "tensorrt_rtx")
    reason = missing("tensorrt", "longlive", "int8")
    wanted = "engine longlive computes in fp32 or fp16 or bf16 or fp8 with TensorRT, int8 is asked for"
    assert reason == wanted
    reason = missing("tensorrt", "ancat", "fp8")
    assert reason == "engine ancat computes in fp32 or fp16 or bf16 with TensorRT, fp8 is asked for"
    torches: dict[Runtime, str] = {"torch-cuda": "fp32 or bf16 or fp8", "torch-cpu": "fp32 or bf16"}
    for runtime, video in torches.items():
        reason = missing(runtime, "easycontrol", "int8")
        assert reason == "engine easycontrol computes in fp32 or bf16 with PyTorch, int8 is asked for"
        reason = missing(runtime, "longlive", "fp16")
        assert reason == f"engine longlive computes in {video} with PyTorch, fp16 is asked for"
    assert missing("torch-cpu", "longlive", "bf16") is None
    assert missing("torch-cpu", "ancat", "bf16") is None


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("there", [False, True])
def test_pytorch_is_asked_for_a_device(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    wanted = None if there else "PyTorch finds no CUDA device"
    assert missing("torch-cuda", "easycontrol", "fp32") == wanted
    assert missing("torch-cuda", "ancat", "fp32") == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("torch-cuda, onnxruntime", ("torch-cuda", "onnxruntime")),
        ('["torch-cpu"]', ("torch-cpu",)),
        ("onnxruntime", ("onnxruntime",)),
    ],
)
def test_the_order_from_environment_and_flags(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: tuple[str, ...]
) -> None:
    assert load_config(flags={"runtimes": value}).runtimes == wanted
    assert load_config(flags={"runtimes": list(wanted)}).runtimes == wanted
    monkeypatch.setenv("REALTIDE_RUNTIMES", value)
    config = load_config()
    assert config.runtimes == wanted
    assert config.printable()["runtimes"] == list(wanted)
    assert load_config(flags={"models": [{"bundle": "a", "runtimes": value}]}).models[0].runtimes == wanted


@pytest.mark.parametrize("value", ["", "cuda", [], ["torch-cpu", "torch-cpu"], [1], 3, '["torch-cpu"', [{}]])
def test_orders_that_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="runtimes: ") as error:
        load_config(flags={"runtimes": value})
    if value not in (3, '["torch-cpu"'):
        assert "must be one or more of tensorrt, torch-cuda, onnxruntime, torch-cpu" in str(error.value)
    with pytest.raises(ConfigError, match=r"models\.0\.runtimes"):
        load_config(flags={"models": [{"bundle": "a", "runtimes": value}]})


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose engine is loaded with onnxruntime never, and otherwise with what it notes."""

    class Module:
        @staticmethod
        def load(bundle: Path, **options: Any) -> BurstEngine:
            if options["backend"] == "onnxruntime":
                raise BundleError("no such graph")
            engine = BurstEngine()
            engine.options = options  # type: ignore[attr-defined]
            return engine

    (tmp_path / "manifest.yaml").write_text("engine: easycontrol\n")
    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    return tmp_path


def lacking(monkeypatch: pytest.MonkeyPatch, *names: Runtime) -> None:
    monkeypatch.setattr(
        runtimes, "missing", lambda runtime, *_: f"no {runtime} here" if runtime in names else None
    )


def test_the_first_that_can_be_had_is_taken(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking(monkeypatch, "tensorrt")
    with caplog.at_level(logging.WARNING):
        loaded = load_engines(ModelConfig(bundle=bundle), ServerConfig(runtimes=RUNTIMES))
    assert loaded.choice == Choice("torch-cuda", (Passed("tensorrt", "no tensorrt here"),))
    (engine,) = loaded.engines
    options: dict[str, Any] = engine.options  # type: ignore[union-attr]
    assert (options["backend"], options["device"]) == ("torch", "cuda:0")
    (record,) = caplog.records
    assert record.getMessage() == "runtime not taken"
    assert vars(record)["runtime"] == "tensorrt"
    assert vars(record)["reason"] == "no tensorrt here"


def test_one_that_cannot_load_the_bundle_is_passed_over(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch)
    model = ModelConfig(bundle=bundle, runtimes=("onnxruntime", "torch-cpu"))
    loaded = load_engines(model, ServerConfig(runtimes=("torch-cuda",)))
    assert loaded.choice == Choice("torch-cpu", (Passed("onnxruntime", "no such graph"),))
    assert "device" not in loaded.engines[0].options  # type: ignore[union-attr]


def test_if_none_can_be_had_all_reasons_are_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "torch-cpu")
    with pytest.raises(ConfigError, match="onnxruntime: no such graph; torch-cpu: no torch-cpu here"):
        load_engines(ModelConfig(bundle=bundle), ServerConfig(runtimes=("onnxruntime", "torch-cpu")))
    with pytest.raises(ConfigError, match="models: no such graph"):
        load_engines(ModelConfig(bundle=bundle), ServerConfig())


@pytest.mark.usefixtures("no_driver")
def test_one_demanded_alone_refuses_to_start() -> None:
    for runtime in ("tensorrt", "torch-cuda"):
        with pytest.raises(ConfigError) as error:
            load_engines(ModelConfig(bundle=SPEECH), ServerConfig(runtimes=(runtime,)))
        assert str(error.value) == (
            f"models: {SPEECH} can be served by none of the runtimes asked for: {runtime}: {NO_DRIVER}"
        )


@pytest.mark.usefixtures("no_driver")
async def test_the_models_service_says_what_runs_and_what_does_not() -> None:
    model = ModelConfig(bundle=SPEECH, slots=1, runtimes=("tensorrt", "torch-cuda", "torch-cpu"))
    async with (
        Server(ServerConfig(**DEFAULTS, models=(model,))) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: Any = models_pb2_grpc.ModelsStub(channel)
        asked = models_pb2.DescribeModelRequest(name="ancat-commands-en")
        described = (await stub.DescribeModel(asked)).model
    assert (described.runtime, described.backend, described.device) == ("torch-cpu", "torch", "cpu")
    assert [(one.runtime, one.reason) for one in described.runtimes_passed] == [
        ("tensorrt", NO_DRIVER),
        ("torch-cuda", NO_DRIVER),
    ]


def test_a_server_without_a_gpu_imports_no_pytorch_to_find_out() -> None:
    code = (
        "import sys\n"
        "from realtide.server import runtimes\n"
        "from realtide.server.config import ModelConfig, ServerConfig\n"
        "from realtide.server.loading import load_engines\n"
        "runtimes._DRIVER = ()\n"
        f"model = ModelConfig(bundle={str(SPEECH)!r}, slots=1)\n"
        "loaded = load_engines(model, ServerConfig(runtimes=runtimes.RUNTIMES))\n"
        "print(loaded.choice.runtime, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "onnxruntime False\n", done.stderr


def test_tensorrt_serves_from_plans_and_a_bundle_without_is_passed_over(
    video_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runtimes.BACKENDS, "tensorrt", ("tensorrt", "cpu"))
    monkeypatch.setattr(gpu, "detect", lambda: Gpu("NVIDIA L4", "8.9", "570.86"))
    lacking(monkeypatch)
    config = ServerConfig(
        runtimes=RUNTIMES, plan_directory=tmp_path / "plans", precision="fp16", video_slots=1
    )
    model = ModelConfig(bundle=video_bundle, runtimes=("tensorrt", "torch-cpu"), precision="fp32")
    with installed() as builder:
        loaded = load_engines(model, config)
        assert loaded.choice.runtime == "torch-cpu"
        (passed,) = loaded.choice.passed
        assert passed.reason.startswith("there is no plan of small-video/prompt/float32 in ")
        assert builder.built == 0
        built = load_engines(model, config.model_copy(update={"build_plans": True}))
        assert built.choice == Choice("tensorrt")
        assert builder.built == 7
        again = load_engines(model, config)
        assert (again.choice, builder.built) == (Choice("tensorrt"), 7)
    for each in (loaded, built, again):
        close(each)


def close(loaded: Loaded) -> None:
    for engine in loaded.engines:
        assert not isinstance(engine, RemoteEngine)
        engine.close()


def test_pytorch_compiles_if_it_is_asked_to(video_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def plain(module: nn.Module, **options: Any) -> nn.Module:
        compiled.append(type(module).__name__)
        return module

    monkeypatch.setattr(torch, "compile", plain)
    model = ModelConfig(bundle=video_bundle, runtimes=("torch-cpu",))
    for wanted in (False, True):
        loaded = load_engines(model, ServerConfig(video_slots=1, torch_compile=wanted))
        assert bool(compiled) == wanted
        close(loaded)


async def test_engines_that_were_handed_over_have_no_runtime() -> None:
    async with Server(ServerConfig(**DEFAULTS), [BurstEngine()]) as server:
        assert server.host.models["bursts"].choice is None
