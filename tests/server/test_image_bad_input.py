"""Every bad input of an image session: its status, the field it names, and nobody's slot lost."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from realtide.server.pictures import BadPicture, Bounds, decode
from realtide_client.v1 import common_pb2, image_pb2
from tests.server.helpers import failure, responses, violation
from tests.server.image_helpers import (
    JPEG,
    RAW,
    Request,
    cancelling,
    checkpointing,
    finishing,
    forgetting,
    images_of,
    opening,
    picture,
    serving,
    upload,
    wanting,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SETTINGS: dict[str, Any] = {
    "max_prompt_characters": 30,
    "max_checkpoint_bytes": 65536,
    "max_upload_pixels": 4096,
    "max_session_conditions": 2,
    "max_message_bytes": 65536,
}
NAN = float("nan")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def film() -> bytes:
    """A WebP file of two frames."""
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    written = io.BytesIO()
    frames[0].save(written, "WEBP", save_all=True, append_images=frames[1:])
    return written.getvalue()


FIRST = [
    (wanting(), "control", "open"),
    (upload(), "condition", "open"),
    (finishing(), "finish", "open"),
    (Request(), "message", "open"),
    (Request(resume=common_pb2.Resume()), "resume.checkpoint", "1 to 65536"),
    (Request(open=image_pb2.ImageOpen()), "open.options", "required"),
    (opening(encoding=0), "open.options.encoding", "1 (RAW_RGB), 2 (JPEG), 3 (PNG)"),
    (opening(encoding=7), "open.options.encoding", "1 (RAW_RGB), 2 (JPEG), 3 (PNG)"),
    (opening(encoding=JPEG, jpeg_quality=0), "open.options.jpeg_quality", "0, must be 1 to 100"),
    (opening(encoding=RAW, jpeg_quality=90), "open.options.jpeg_quality", "only for JPEG, not for RAW_RGB"),
]

# After one upload called "sketch".
LATER = [
    (opening(), "open", "open already"),
    (Request(), "message", "exactly one"),
    (upload(""), "condition.condition_id", "0 bytes, must be 1 to 128"),
    (upload("é" * 65), "condition.condition_id", "130 bytes"),
    (upload("x", "pose"), "condition.kind", "'pose', must be one of canny, depth, subject"),
    (upload("x", data=b""), "condition.data", "0 bytes, must be 1 to 65536"),
    (upload("x", data=b"not an image"), "condition.data", "must be one of PNG, JPEG, WEBP"),
    (upload("x", data=picture(form="BMP")), "condition.data", "must be one of PNG, JPEG, WEBP"),
    (upload("x", data=picture()[:300]), "condition.data", "cannot be decoded"),
    (upload("x", data=picture(size=(64, 65))), "condition.data", "64x65 pixels, at most 4096"),
    (upload("x", data=bomb()), "condition.data", "too many pixels, at most 4096"),
    (upload("x", data=film()), "condition.data", "several frames"),
    (wanting(""), "control.control_id", "at least one"),
    (Request(control=image_pb2.ImageControl(control_id="c")), "control.action", "exactly one"),
    (wanting(prompt=" "), "control.generate.prompt", "1 characters, must be 1 to 30"),
    (wanting(prompt="a" * 31), "control.generate.prompt", "31 characters, must be 1 to 30"),
    (wanting(prompt="a" * 29), "control.generate.prompt", "29 tokens, at most 24"),
    (wanting(width=30), "control.generate.width", "30, must be a multiple of 8 from 16 to 64"),
    (wanting(width=72), "control.generate.width", "72, must be a multiple of 8 from 16 to 64"),
    (wanting(height=8), "control.generate.height", "8, must be a multiple of 8 from 16 to 64"),
    (wanting(height=2**32 - 8), "control.generate.height", "from 16 to 64"),
    (wanting(steps=0), "control.generate.steps", "0, must be 1 to 10"),
    (wanting(steps=11), "control.generate.steps", "11, must be 1 to 10"),
    (wanting(guidance=10.5), "control.generate.guidance", "10.5, must be 0 to 10"),
    (wanting(guidance=NAN), "control.generate.guidance", "must be 0 to 10"),
    (wanting(preview_interval=11), "control.generate.preview_interval", "11, must be 0 to 10"),
    (
        wanting("c", ("other", None)),
        "control.generate.conditions[0].condition_id",
        "no condition of this session",
    ),
    (
        wanting("c", ("sketch", None), ("sketch", 2.5)),
        "control.generate.conditions[1].weight",
        "2.5, must be 0 to 2",
    ),
    (wanting("c", ("sketch", NAN)), "control.generate.conditions[0].weight", "must be 0 to 2"),
    (wanting("c", *[("sketch", None)] * 3), "control.generate.conditions", "3, at most 2"),
    (cancelling("c", ""), "control.cancel.control_id", "at least one"),
    (forgetting("c", "other"), "control.forget.condition_id", "no condition of this session"),
    (checkpointing("x" * 129), "checkpoint_request.request_id", "at most 128"),
]


@pytest.mark.parametrize(("request_", "field", "range_"), FIRST, ids=lambda value: str(value)[:50].strip())
async def test_first_message(request_: image_pb2.ImageStreamRequest, field: str, range_: str) -> None:
    async with serving(**SETTINGS) as server:
        call = server.stream()
        await call.write(request_)
        error = await failure(call)
        assert error.code() == INVALID
        named, problem = violation(error)
        assert named == field
        assert range_ in problem
        assert server.metric("realtide_sessions_opened_total") == 0


async def test_later_messages() -> None:
    """Each stream at fault ends; a bystander on the same server gets its image all the same."""
    async with serving(**SETTINGS) as server:
        bystander = await server.opened()
        await bystander.write(upload("mine"))
        for request, field, range_ in LATER:
            call = await server.opened()
            await call.write(upload())
            await call.write(request)
            error = await failure(call)
            assert (error.code(), violation(error)[0]) == (INVALID, field), error.details()
            assert range_ in violation(error)[1]
        # What another session has uploaded is as unknown as what nobody has.
        call = await server.opened()
        await call.write(wanting("c", ("mine", None)))
        assert "no condition of this session (it has none)" in violation(await failure(call))[1]
        await bystander.write(wanting("one", ("mine", None)))
        await bystander.write(finishing())
        assert len(images_of(await responses(bystander))) == 1
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == len(LATER) + 1
        assert server.metric("realtide_sessions_closed_total", outcome="ok") == 1


async def test_a_session_may_have_so_many_conditions() -> None:
    async with serving(**SETTINGS) as server:
        call = await server.opened()
        for name in ("a", "b", "a"):  # one takes another's place
            await call.write(upload(name))
        await call.write(forgetting("f", "a"))
        await call.write(upload("c"))
        await call.write(upload("d"))
        error = await failure(call)
        assert violation(error) == ("condition", "the session has 2 conditions already, no more are accepted")


async def test_after_finish() -> None:
    async with serving() as server:
        call = await server.opened()
        await call.write(wanting("long", steps=10))
        await call.write(finishing())
        await call.write(upload())
        assert "came after finish" in violation(await failure(call))[1]
        await server.all_free()


async def test_too_many_controls() -> None:
    async with serving(max_pending_controls=2) as server:
        call = await server.opened()
        for number in range(4):
            await call.write(wanting(str(number), steps=10))
        assert violation(await failure(call))[0] == "control"
        await server.all_free()


BOUNDS = Bounds(1 << 16, 4096)


def test_stretched_and_padded() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    written = io.BytesIO()
    image.save(written, "PNG")
    whole = decode(written.getvalue(), BOUNDS, 16, stretch=True)
    assert (whole == (255, 0, 0)).all()
    padded = decode(written.getvalue(), BOUNDS, 16, stretch=False)
    assert (padded[4:12] == (255, 0, 0)).all()
    assert (padded[:4] == 128).all()
    assert (padded[12:] == 128).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 51400, np.uint16))
    else:
        image = Image.new("L", (8, 8), 200).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(0)
    written = io.BytesIO()
    image.save(written, "PNG")
    pixels = decode(written.getvalue(), BOUNDS, 8, stretch=True)
    want = {"RGBA": 0, "LA": 0}.get(mode, 200)
    assert abs(int(pixels.mean()) - want) <= (10 if mode == "1" else 1)  # two colours: a mixture


def test_a_turned_photograph_stands_upright() -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    written = io.BytesIO()
    image.save(written, "JPEG", exif=exif, quality=95)
    pixels = decode(written.getvalue(), BOUNDS, 8, stretch=True)
    assert pixels[:3].mean() < 40
    assert pixels[5:].mean() > 215


def test_truncated_files_of_every_format_are_refused() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = picture(form=form)
        with pytest.raises(BadPicture, match="cannot be decoded"):
            decode(data[: len(data) // 2], BOUNDS, 8, stretch=True)
        assert decode(data, BOUNDS, 8, stretch=True).shape == (8, 8, 3)
