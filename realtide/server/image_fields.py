"""Checks every field of an image session's messages and translates them to the engine's inputs.

Each refusal names the field's path and the accepted range, and comes before a slot is taken (open) or before
the engine has seen anything of the message (uploads, controls).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from realtide.engines.easycontrol import types
from realtide.server.config import ServerConfig
from realtide.server.pictures import BadPicture, Bounds, Pixels8, decode, encode
from realtide.server.status import invalid
from realtide_client.v1 import image_pb2 as pb

ENCODINGS: dict[int, str] = {
    pb.IMAGE_ENCODING_RAW_RGB: "RAW_RGB",
    pb.IMAGE_ENCODING_JPEG: "JPEG",
    pb.IMAGE_ENCODING_PNG: "PNG",
}

# proto: ImageOptions
_QUALITIES = (1, 100)
_DEFAULT_QUALITY = 90
# A seed that the server chooses is short enough to be written down.
_SEED_BITS = 32


@dataclass(frozen=True, slots=True)
class Fields:
    """Checks against one model's and one server's limits."""

    info: types.ImageModelInfo
    config: ServerConfig

    @property
    def bounds(self) -> Bounds:
        """Of uploads. What is around the picture in its message is small."""
        return Bounds(self.config.max_message_bytes, self.config.max_upload_pixels)

    def limits(self) -> pb.ImageLimits:
        """The ranges as the client is told."""
        info = self.info
        return pb.ImageLimits(
            max_prompt_tokens=info.max_prompt_tokens,
            max_prompt_characters=self.config.max_prompt_characters,
            size_multiple=info.multiple,
            min_side=info.side_range[0],
            max_side=info.side_range[1],
            max_pixels=info.max_pixels,
            max_steps=info.max_steps,
            min_guidance=info.guidance_range[0],
            max_guidance=info.guidance_range[1],
            max_conditions=info.max_conditions,
            max_session_conditions=self.config.max_session_conditions,
            min_weight=info.weight_range[0],
            max_weight=info.weight_range[1],
            max_upload_bytes=self.bounds.max_bytes,
            max_upload_pixels=self.bounds.max_pixels,
        )

    def options(self, given: pb.ImageOptions, path: str) -> pb.ImageOptions:
        """Check the options and fill in every default."""
        full = pb.ImageOptions()
        full.CopyFrom(given)
        if full.encoding not in ENCODINGS:
            known = ", ".join(f"{number} ({name})" for number, name in ENCODINGS.items())
            raise invalid(f"{path}.encoding", f"{full.encoding}, must be one of {known}")
        if full.encoding == pb.IMAGE_ENCODING_JPEG:
            full.jpeg_quality = full.jpeg_quality if full.HasField("jpeg_quality") else _DEFAULT_QUALITY
            _within(f"{path}.jpeg_quality", full.jpeg_quality, *_QUALITIES)
        elif full.HasField("jpeg_quality"):
            raise invalid(f"{path}.jpeg_quality", f"is only for JPEG, not for {ENCODINGS[full.encoding]}")
        return full

    def upload(self, given: pb.ConditionUpload, known: Collection[str]) -> None:
        """Check all of an upload but the picture, which `picture` does."""
        name, limit = given.condition_id, self.config.max_control_id_bytes
        if not 0 < len(name.encode()) <= limit:
            raise invalid("condition.condition_id", f"{len(name.encode())} bytes, must be 1 to {limit}")
        if given.kind not in self.info.kinds:
            kinds = ", ".join(self.info.kinds) or "none: the model takes no conditions"
            raise invalid("condition.kind", f"{given.kind!r}, must be one of {kinds}")
        most = self.config.max_session_conditions
        if name not in known and len(known) >= most:
            raise invalid("condition", f"the session has {most} conditions already, no more are accepted")

    def picture(self, given: pb.ConditionUpload) -> Pixels8:
        """The picture of a checked upload. Takes a while: not for the event loop."""
        stretch = self.info.kinds[given.kind] == "spatial"
        try:
            return decode(given.data, self.bounds, self.info.condition_size, stretch=stretch)
        except BadPicture as error:
            raise invalid("condition.data", str(error)) from None

    def control(self, control: pb.ImageControl, known: Mapping[str, str]) -> types.ImageInput:
        """Check a control of a session that has uploaded `known` conditions (their kinds by id)."""
        action = control.WhichOneof("action")
        if action == "generate":
            return self._generate(control.control_id, control.generate, known)
        if action == "cancel":
            if not control.cancel.control_id:
                raise invalid("control.cancel.control_id", "empty, at least one character is needed")
            return types.Cancel(control.control_id, control.cancel.control_id)
        if action == "forget":
            name = control.forget.condition_id
            if name not in known:
                raise invalid("control.forget.condition_id", _unknown(name, known))
            return types.Forget(control.control_id, name)
        raise invalid("control.action", "none set, exactly one is needed")

    def _generate(self, control_id: str, given: pb.Generate, known: Mapping[str, str]) -> types.Generate:
        path, info = "control.generate", self.info
        self._prompt(given.prompt, f"{path}.prompt")
        width, height = self._size(given, path)
        steps = given.steps if given.HasField("steps") else info.steps
        _within(f"{path}.steps", steps, 1, info.max_steps, "steps")
        guidance = info.guidance or 0.0
        if given.HasField("guidance"):
            if info.guidance is None:
                raise invalid(f"{path}.guidance", "this model takes none, it must not be set")
            guidance = given.guidance
            _within(f"{path}.guidance", guidance, *info.guidance_range)
        _within(f"{path}.preview_interval", given.preview_interval, 0, info.max_steps, "steps")
        return types.Generate(
            control_id=control_id,
            prompt=given.prompt,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            seed=given.seed if given.HasField("seed") else secrets.randbits(_SEED_BITS),
            conditions=self._conditions(given, known, f"{path}.conditions"),
            preview_interval=given.preview_interval,
            received=time.monotonic(),
        )

    def _conditions(
        self, given: pb.Generate, known: Mapping[str, str], path: str
    ) -> tuple[tuple[str, float], ...]:
        """In the order of the release: subjects first."""
        most = self.info.max_conditions
        if len(given.conditions) > most:
            raise invalid(path, f"{len(given.conditions)}, at most {most} are accepted")
        chosen = []
        for number, condition in enumerate(given.conditions):
            name = condition.condition_id
            if name not in known:
                raise invalid(f"{path}[{number}].condition_id", _unknown(name, known))
            weight = condition.weight if condition.HasField("weight") else 1.0
            _within(f"{path}[{number}].weight", weight, *self.info.weight_range)
            chosen.append((name, weight))
        return tuple(sorted(chosen, key=lambda one: self.info.kinds[known[one[0]]] != "subject"))

    def _prompt(self, prompt: str, path: str) -> None:
        most = self.config.max_prompt_characters
        if not prompt.strip() or len(prompt) > most:
            raise invalid(path, f"{len(prompt)} characters, must be 1 to {most} and not only spaces")
        tokens, limit = self.info.count_tokens(prompt), self.info.max_prompt_tokens
        if tokens > limit:
            raise invalid(path, f"{tokens} tokens, at most {limit} are accepted")

    def _size(self, given: pb.Generate, path: str) -> tuple[int, int]:
        info = self.info
        low, high = info.side_range
        size = (
            given.width if given.HasField("width") else info.size[0],
            given.height if given.HasField("height") else info.size[1],
        )
        for name, value in zip(("width", "height"), size, strict=True):
            if not low <= value <= high or value % info.multiple:
                problem = f"{value}, must be a multiple of {info.multiple} from {low} to {high} pixels"
                raise invalid(f"{path}.{name}", problem)
        if size[0] * size[1] > info.max_pixels:
            problem = f"{size[0]}x{size[1]} pixels, at most {info.max_pixels} pixels are accepted"
            raise invalid(f"{path}.height", problem)
        return size


def encoder_for(options: pb.ImageOptions) -> types.Encode:
    """What makes bytes of pixels, from complete options."""
    name, quality = ENCODINGS[options.encoding], options.jpeg_quality
    return lambda pixels: encode(pixels, name, quality)


def _unknown(name: str, known: Collection[str]) -> str:
    """Ids are a session's own: what another one has uploaded is as unknown as what nobody has."""
    there = f"it has {len(known)}" if known else "it has none"
    return f"{name!r} is no condition of this session ({there}); upload it first"


def _within(path: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Refuse what is not from `low` to `high`; NaN is not."""
    if not low <= value <= high:
        raise invalid(path, f"{value:.12g}, must be {low:.12g} to {high:.12g}{' ' + unit if unit else ''}")
