"""The whole check: rates, golden replays and times, part by part within a budget of time (ours)."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from realtide.engines.runtime.golden import CaseError
from realtide.engines.runtime.program import ProgramError
from realtide.gpu import images, replays, speech, video
from realtide.gpu.bench import Bench, Skipped
from realtide.gpu.timing import Budget, Clock, measure_rates

Tell = Callable[[str], None]
_REPLAY_SECONDS = 120.0


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        device: ``cuda``, ``cuda:1``, or ``cpu``.
        small: tiny models.
        compiled: compile the modules of video and images with `torch.compile`.
        budget: seconds for everything.
        goldens: directories with golden cases.
        case: pattern that names of cases must match.
    """

    device: str = "cuda"
    small: bool = False
    compiled: bool = False
    budget: float = 480.0
    goldens: tuple[Path, ...] = ()
    case: str = "*"


class CheckError(Exception):
    """Nothing can be checked; the message is one sentence."""


def check(options: Options, tell: Tell) -> dict[str, Any]:
    """Run every part that the machine and the time allow; `tell` gets a line for each.

    Returns:
        What was found, plain values; under ``failed`` what should have worked and did not.

    Raises:
        CheckError: the device is not there, or no golden case is.
    """
    device = _device(options.device)
    budget = Budget(options.budget)
    clock = Clock(device, least=1 if options.small else 3)
    try:
        cases = replays.find(options.goldens, options.case)
    except CaseError as error:
        raise CheckError(str(error)) from None
    sizes, copied = ((256,), 4 << 20) if options.small else ((4096, 8192), 1 << 30)
    rates = measure_rates(clock, torch.bfloat16, sizes, copied)
    tell(
        f"{_name(device)}: {rates.operations / 1e12:.2f} TFLOP/s in bfloat16 products,"
        f" {rates.bytes / 1e9:.1f} GB/s copied"
    )
    bench = Bench(device, torch.bfloat16, options.small, clock, rates)
    found: dict[str, Any] = {
        "device": _described(device),
        "options": {"device": options.device, "small": options.small, "compiled": options.compiled},
        "rates": {
            "operations_per_second": rates.operations,
            "bytes_per_second": rates.bytes,
            "dtype": "bfloat16",
        },
    }
    seconds = min(_REPLAY_SECONDS, options.budget / 4)
    # Name, seconds that the part may take, and the part.
    parts: Sequence[tuple[str, float, Callable[[], dict[str, Any]]]] = (
        ("replays", seconds, lambda: {"backends": replays.run(cases, str(device), seconds)}),
        ("longlive", 120.0, lambda: video.run(bench, options.compiled)),
        *(
            (f"easycontrol_{size}", wanted, partial(images.run, bench, options.compiled, size))
            for size, wanted in (("fitting", 40.0), ("flux", 80.0))
        ),
        *((f"ancat_{size}", 60.0, partial(speech.run, bench, size)) for size in speech.SIZES),
    )
    failed: list[str] = []
    for name, wanted, part in parts:
        found[name] = _part(name, wanted if not options.small else 0.0, part, budget, failed)
        _told(name, found[name], tell)
    failed += replays.failures(found["replays"].get("backends", {}))
    found["failed"] = failed
    return found


def _part(
    name: str, wanted: float, part: Callable[[], dict[str, Any]], budget: Budget, failed: list[str]
) -> dict[str, Any]:
    if budget.left < wanted or budget.left <= 0:
        return {
            "skipped": f"{max(budget.left, 0.0):.0f} s of the budget are left,"
            f" this part may take {wanted:.0f}"
        }
    begin = time.monotonic()
    try:
        made = part()
    except Skipped as error:
        return {"skipped": str(error)}
    except (RuntimeError, ProgramError) as error:
        # PyTorch raises RuntimeError, out of memory included. The other parts can tell something still.
        failed.append(f"{name}: {str(error).splitlines()[0]}")
        return {"error": str(error)}
    return {**made, "seconds": round(time.monotonic() - begin, 1)}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CheckError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CheckError(
                "no CUDA device: PyTorch "
                + (
                    f"is built for CUDA {torch.version.cuda} and finds none"
                    if torch.version.cuda
                    else "is built without CUDA"
                )
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise CheckError(f"device {name} does not exist: there are {torch.cuda.device_count()}")
        return torch.device("cuda", device.index or 0)
    return device


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _described(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    seen = torch.cuda.get_device_properties(device)
    cudnn: Any = torch.backends.cudnn
    return {
        "name": seen.name,
        "capability": f"{seen.major}.{seen.minor}",
        "memory_bytes": seen.total_memory,
        "multiprocessors": seen.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "driver": _driver(device.index or 0),
    }


def _driver(index: int) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run(
        [program, f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None


def _told(name: str, part: dict[str, Any], tell: Tell) -> None:
    """A part in lines: times with their floors beside them."""
    for reason in ("skipped", "error"):
        if reason in part:
            tell(f"{name}: {reason}: {str(part[reason]).splitlines()[0]}")
            return
    if name == "replays":
        for backend, each in part["backends"].items():
            for case in each.get("cases", ()):
                state = "ok" if case.get("ok") else "skipped" if "skipped" in case else "NOT ok"
                more = (
                    f"rel_l2 {case['rel_l2']:.1e}"
                    if "rel_l2" in case
                    else case.get("skipped", case.get("error"))
                )
                tell(f"replay {case['case']} on {backend} ({each['device']}): {state}, {more}")
            if "skipped" in each:
                tell(f"replays on {backend}: skipped: {each['skipped']}")
        return
    _times(name, part, tell)
    if "streams_held" in part:
        tell(f"{name}: {part['streams_held']} streams held in real time (most tried: {part['most_tried']})")


def _times(name: str, part: dict[str, Any], tell: Tell) -> None:
    if "ms" in part:
        floors = ""
        if "floor_operations_ms" in part:
            floors = (
                f" (floors: operations {part['floor_operations_ms']:.3f}, bytes {part['floor_bytes_ms']:.3f};"
                f" {part['over_floor']:.2f} times)"
            )
        rate = f", {part['fps']} frames/s" if "fps" in part else ""
        tell(f"{name}: {part['ms']:.3f} ms{floors}{rate}")
        return
    for key, value in part.items():
        if isinstance(value, dict):
            _times(f"{name} {key}", value, tell)
        elif isinstance(value, list):
            for each in value:
                _times(f"{name} {each['streams']} streams", each, tell)
