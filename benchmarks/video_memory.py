"""Memory of a video server: with the bundle loaded, and what each open session adds, against the arithmetic.

A fresh server process; its resident memory (all of it, shared libraries included, from /proc) is read when it
is healthy, after one session (what a first session allocates once), and after each of N further sessions that
have filled their windows and stay open. What a session adds is the slope over those N, which is set against
the bytes that the server computes from the manifest (key/value cache, prompt, latents, decoder). Frames
are sent as raw RGB: an H.264 encoder's own buffers are not the model's; `--encoding h264` shows them.

    python benchmarks/video_memory.py --bundle BUNDLE [--sessions 12] [--encoding raw_rgb] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import realtide_client as rt
from realtide.bench import report
from realtide.cli.own_server import own_server
from realtide.engines.longlive.config import StreamConfig, TransformerConfig, VideoConfig, session_bytes
from realtide.engines.longlive.config import VaeConfig as Vae

OUT = Path(__file__).parent / "results" / "video_memory.json"
PROMPT = "a red apple moves to the right on a blue background"


async def watch(stream: Any, frames: int) -> None:
    """Take frames of a stream."""
    async for event in stream:
        if isinstance(event, rt.Frames) and event.position + event.count >= frames:
            return


async def measure(
    bundle: Path, sessions: int, encoding: str, prompt: str, settings: list[str]
) -> dict[str, Any]:
    """All readings, in bytes."""
    async with own_server([bundle], (f"video_slots={sessions + 1}", *settings)) as server:
        process = psutil.Process(server.pid)

        def resident() -> int:
            return int(process.memory_info().rss)

        loaded = resident()
        async with rt.connect(server.address) as client, contextlib.AsyncExitStack() as stack:
            model = next(m for m in await client.models() if m.HasField("video"))
            frames = 6 * model.video.block_frames  # more than a window
            readings = []
            for seed in range(sessions + 1):
                stream = await stack.enter_async_context(
                    client.video(prompt=prompt, seed=seed, encoding=encoding, buffer_seconds=1.0)
                )
                await watch(stream, frames)
                await asyncio.sleep(0.5)
                readings.append(resident())
                if seed == 1:
                    two = resident()
    slope = float(np.polyfit(np.arange(sessions), readings[1:], 1)[0])
    return {
        "encoding": encoding,
        "sessions": sessions,
        "loaded_bytes": loaded,
        "with_two_sessions_bytes": two,
        "readings_bytes": readings,
        "per_session_bytes": round(slope),
        "computed_per_session_bytes": int(model.video.session_bytes),
        "measured_over_computed": round(slope / model.video.session_bytes, 4),
        "computed_832x480_bf16_bytes": full_size(),
    }


def full_size() -> dict[str, int]:
    """The same arithmetic for Wan2.1-1.3B at 832x480 in 16-bit numbers."""
    video = VideoConfig(TransformerConfig(), StreamConfig())
    vae = Vae(mean=(0.0,) * 16, std=(1.0,) * 16)
    model, stream = video.transformer, video.stream
    cache = 2 * 2 * model.layers * stream.window * video.frame_tokens * model.dim
    return {"key_value_cache": cache, "session": session_bytes(video, vae, itemsize=2)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--encoding", choices=["raw_rgb", "jpeg", "h264"], default="raw_rgb")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE setting of the server")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = asyncio.run(
        measure(arguments.bundle, arguments.sessions, arguments.encoding, arguments.prompt, arguments.set)
    )
    report.write(arguments.out, report.envelope("video_memory", found))
    print(json.dumps({k: v for k, v in found.items() if k != "readings_bytes"}, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
