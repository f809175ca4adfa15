"""The demo's part about images: one sketch, two prompts, previews while they form."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from realtide_client import Client

_PROMPTS = (
    "an emoji on a yellow background, flat style",
    "an emoji on a blue background, flat style",
)
_SEED = 2
_ZOOM = 4


async def draw(out: Console, client: Client, directory: Path) -> list[tuple[str, float | None]]:
    """Make two images under one sketch and write them beside it; what was measured, in seconds."""
    import realtide_client as rt
    from realtide.cli.image import find_model

    model = await find_model(client, "")
    kinds = [kind.name for kind in model.image.kinds]
    size = model.image.condition_size
    out.print(f"\nDrawing two images{f' from one sketch ({kinds[0]})' if kinds else ''}:\n")
    sketch, asked, first, shown = _sketch(size), time.monotonic(), None, [_sketch(size)]
    ready: list[float] = []
    async with client.image(model=model.name, encoding="png") as stream:
        conditions = [await stream.condition(kinds[0], sketch)] if kinds else []
        for prompt in _PROMPTS:
            await stream.generate(prompt, conditions=conditions, seed=_SEED, preview_interval=1)
        await stream.finish()
        async for event in stream:
            since = time.monotonic() - asked
            if isinstance(event, rt.Preview) and first is None:
                first = since
            elif isinstance(event, rt.ConditionsReady):
                ready.append(event.seconds)
            elif isinstance(event, rt.Image):
                shown.append(event.data)
                out.print(f"  {since:6.2f} s  {_PROMPTS[len(shown) - 2]}")
    picture = directory / "images.png"
    _sheet(shown, picture)
    out.print(f"\nThe sketch and the images: [bold]{picture}[/]\n", soft_wrap=True)
    return [
        ("first preview, after the images were asked for", first),
        ("sketch and prompt ready, computed", ready[0] if ready else None),
        ("the same sketch under the next prompt", ready[-1] if len(ready) > 1 else None),
    ]


def _sketch(size: int) -> bytes:
    """White lines on black, as Canny maps come: a face with two ears."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size))
    pen = ImageDraw.Draw(picture)

    def ring(x: float, y: float, radius: float) -> None:
        box = [size * (x - radius), size * (y - radius), size * (x + radius), size * (y + radius)]
        pen.ellipse(box, outline=(255, 255, 255), width=max(1, size // 64))

    for x, y, radius in (
        (0.5, 0.55, 0.34),
        (0.24, 0.2, 0.12),
        (0.76, 0.2, 0.12),
        (0.38, 0.48, 0.05),
        (0.62, 0.48, 0.05),
    ):
        ring(x, y, radius)
    ring(0.5, 0.66, 0.07)
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def _sheet(files: list[bytes], path: Path) -> None:
    """The pictures side by side, enlarged."""
    from PIL import Image

    tiles: list[Any] = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    side = _ZOOM * max(max(tile.size) for tile in tiles)
    sheet = Image.new("RGB", (side * len(tiles), side), "white")
    for number, tile in enumerate(tiles):
        scale = side // max(tile.size)
        large = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
        sheet.paste(large, (number * side, 0))
    sheet.save(path)
