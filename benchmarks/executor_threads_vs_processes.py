"""Should the executor be a thread of the server's process or a worker process? Measures both.

A grpc.aio server answers small messages on several paced streams; beside it an ONNX graph of about the size
of a speech step runs without a pause, with one intra-op thread: (a) not at all, (b) in a thread of the same
process, (c) in a thread under a shorter switch interval, (d) in a worker process fed through a pipe with its
tensors in shared memory. Reported are the event loop's lag, the round trip that the clients see, and the
steps per second, because the winner must not buy calm by doing less; each with steps that are all graph, and
with steps of which half is Python that holds the interpreter's lock. Load comes from a process of its own.

    python benchmarks/executor_threads_vs_processes.py [--seconds 6] [--out benchmarks/results/...json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import platform
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, HIDDEN, LAYERS = 32, 192, 768, 8  # 2.4 M weights over 32 packed rows: the order of a speech step
STREAMS, PERIOD, MESSAGE = 16, 0.04, 1280  # 40 ms of LINEAR16 at 16 kHz
METHOD = "/bench.Echo/Stream"
OUT = Path(__file__).parent / "results" / "executor_threads_vs_processes.json"


def graph() -> bytes:
    """A stack of feed-forward layers with a residual, as a serialized model."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for layer in range(LAYERS):
        for index, shape in enumerate(((WIDTH, HIDDEN), (HIDDEN, WIDTH))):
            values = (rng.standard_normal(shape) * 0.02).astype(np.float32)
            weights.append(numpy_helper.from_array(values, f"w{layer}_{index}"))
        nodes += [
            helper.make_node("MatMul", [name, f"w{layer}_0"], [f"h{layer}"]),
            helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]),
            helper.make_node("MatMul", [f"r{layer}", f"w{layer}_1"], [f"o{layer}"]),
            helper.make_node("Add", [name, f"o{layer}"], [f"x{layer}"]),
        ]
        name = f"x{layer}"
    shape = [ROWS, WIDTH]
    made = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def session(model: bytes) -> ort.InferenceSession:
    """One intra-op thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def step(run: ort.InferenceSession, x: Any, python: int) -> Any:
    """The graph, and `python` rounds of Python that holds the interpreter's lock, as a search does."""
    (y,) = run.run(None, {"x": x})
    for _ in range(python):
        y[0].argmax()
    return y


def rounds_as_long_as_the_graph(model: bytes) -> tuple[int, dict[str, float]]:
    """Rounds of Python that take as long as the graph, and the graph's own times."""
    run = session(model)
    x = np.zeros((ROWS, WIDTH), np.float32)

    def timed(python: int) -> list[float]:
        found = []
        for _ in range(200):
            began = time.monotonic()
            step(run, x, python)
            found.append(time.monotonic() - began)
        return found

    alone = timed(0)
    # The least times, which a busy machine disturbs least.
    each = (min(timed(5000)) - min(alone)) / 5000
    return max(round(min(alone) / each), 1), percentiles(alone)


def worker(pipe: Connection, model: bytes, memory: str, python: int) -> None:
    """Process (d): a step for each byte that comes through the pipe."""
    shared = SharedMemory(memory)
    x = np.ndarray((ROWS, WIDTH), np.float32, shared.buf)
    run = session(model)
    pipe.send_bytes(b"r")
    while pipe.recv_bytes() != b"q":
        x[:] = step(run, x, python) * 0.5
        pipe.send_bytes(b"d")
    del x
    shared.close()


def load(port: int, seconds: float, pipe: Connection) -> None:
    """The clients' process: paced streams, the round trip of every message."""

    async def stream(channel: grpc.aio.Channel, offset: float) -> list[float]:
        call: Any = channel.stream_stream(METHOD)(None)
        found = []
        start = time.monotonic() + offset
        for index in range(round(seconds / PERIOD)):
            await asyncio.sleep(max(start + index * PERIOD - time.monotonic(), 0))
            began = time.monotonic()
            await call.write(bytes(MESSAGE))
            await call.read()
            found.append(time.monotonic() - began)
        await call.done_writing()
        return found

    async def main() -> list[float]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            pipe.send("ready")  # from here on it is measured; the start of this process is not
            runs = (stream(channel, PERIOD * index / STREAMS) for index in range(STREAMS))
            return [value for part in await asyncio.gather(*runs) for value in part]

    pipe.send(asyncio.run(main()))


async def echo(requests: Any, context: Any) -> Any:
    """Answer each message with a small one."""
    async for request in requests:
        yield request[:16]


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{at:g}_ms": round(float(np.percentile(values, at)) * 1000, 3) for at in (50, 90, 99, 99.9)}


async def measure(kind: str, python: int, model: bytes, seconds: float) -> dict[str, Any]:
    """Serve the load for so long with the executor as `kind` says."""
    spawn = mp.get_context("spawn")
    done = threading.Event()
    steps = [0]
    child: Any = None
    sys.setswitchinterval(0.0005 if kind == "thread, switch interval 0.5 ms" else 0.005)
    shared = SharedMemory(create=True, size=ROWS * WIDTH * 4)
    ours, theirs = spawn.Pipe()

    def in_thread() -> None:
        run = session(model)
        x = np.zeros((ROWS, WIDTH), np.float32)
        while not done.is_set():
            x = step(run, x, python) * 0.5
            steps[0] += 1

    def in_process() -> None:
        # The thread that hands work over and waits for it, as an executor for a worker would.
        ours.recv_bytes()
        while not done.is_set():
            ours.send_bytes(b"s")
            ours.recv_bytes()
            steps[0] += 1
        ours.send_bytes(b"q")

    thread = None
    if kind.startswith("thread"):
        thread = threading.Thread(target=in_thread)
    elif kind == "process":
        child = spawn.Process(target=worker, args=(theirs, model, shared.name, python))
        child.start()
        thread = threading.Thread(target=in_process)
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench.Echo", {"Stream": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    if thread is not None:
        thread.start()
        while steps[0] < 20:  # noqa: ASYNC110 (another thread counts)
            await asyncio.sleep(0.01)
    result, sender = spawn.Pipe(duplex=False)
    client = spawn.Process(target=load, args=(port, seconds, sender))
    client.start()
    lags: list[float] = []
    while not result.poll():  # noqa: ASYNC110 (another process sends)
        await asyncio.sleep(0.005)
    result.recv()
    before, began = steps[0], time.monotonic()
    while not result.poll():
        due = time.monotonic() + 0.005
        await asyncio.sleep(0.005)
        lags.append(time.monotonic() - due)
    rate = (steps[0] - before) / (time.monotonic() - began)
    trips = result.recv()
    client.join()
    done.set()
    if thread is not None:
        await asyncio.to_thread(thread.join)
    if child is not None:
        child.join()
    await server.stop(0)
    shared.close()
    shared.unlink()
    sys.setswitchinterval(0.005)
    return {
        "executor": kind,
        "steps_per_second": round(rate, 1),
        "event_loop_lag": percentiles(lags),
        "round_trip": percentiles(trips),
        "messages": len(trips),
    }


def machine() -> dict[str, Any]:
    """Where this was measured."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "grpc": grpc.__version__,
        "onnxruntime": ort.__version__,
        "platform": platform.platform(),
    }


def commit() -> str:
    """The commit that was measured."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each of the seven measurements")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    model = graph()
    where = machine()
    rounds, alone = rounds_as_long_as_the_graph(model)
    results = []
    for kind in ("none", "thread", "thread, switch interval 0.5 ms", "process"):
        for share, python in (("none", 0), ("half of the step", rounds)):
            if kind == "none" and python:
                continue
            results.append(asyncio.run(measure(kind, python, model, arguments.seconds)) | {"python": share})
            print(json.dumps(results[-1]))
    report = {
        "benchmark": "executor_threads_vs_processes",
        "command": f"python benchmarks/executor_threads_vs_processes.py --seconds {arguments.seconds:g}",
        "commit": commit(),
        "machine": where,
        "streams": STREAMS,
        "message_bytes": MESSAGE,
        "period_ms": PERIOD * 1000,
        "graph_alone": alone,
        "python_rounds": rounds,
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
