"""Model bundles: a directory with a manifest that says everything a program has to know of a model (ours).

The manifest is the one source of numbers (architecture rule 4): which engine, its architecture's
parameters, input limits, which graph serves which precision, and the size and SHA-256 of every file. This
module knows the frame of that; what `architecture` and `limits` hold is the engine's business.
docs/bundles.md describes the format.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

import realtide

MANIFEST = "manifest.yaml"
SEARCH_PATH = "REALTIDE_MODELS"
"""Environment variable with bundles, or directories of bundles: comma-separated or a JSON list."""

Precision = Literal["float32", "float16", "bfloat16", "int8", "float8"]
PRECISIONS: dict[str, Precision] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8",
}
"""By the short names that commands and settings use."""


class BundleError(ValueError):
    """A bundle cannot be used; the message is one sentence that names the file or the field."""


def _safe_path(text: str) -> str:
    """Accept a plain relative path below the bundle, written with slashes."""
    parts = text.split("/")
    if (
        not text
        or re.search(r"[\\:\x00-\x1f]", text)
        or any(part in ("", ".", "..") or part != part.strip() for part in parts)
    ):
        raise ValueError(f"{text!r} must be a relative path inside the bundle, with slashes and without '..'")
    return text


FilePath = Annotated[str, AfterValidator(_safe_path)]
# YAML turns a bare 2026-11-23 into a date.
Date = Annotated[
    str,
    BeforeValidator(lambda value: value.isoformat() if isinstance(value, datetime.date) else value),
    Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="YYYY-MM-DD."),
]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BundleFile(_Part):
    """One file of the bundle."""

    path: FilePath
    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class DataSource(_Part):
    """Where training or evaluation data came from."""

    name: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    url: str | None = None
    use: str | None = Field(None, description="What it was used for.")


class Provenance(_Part):
    """How the weights came to be."""

    recipe: str = Field(min_length=1, description="Command or file that makes the bundle anew.")
    created: Date
    data: tuple[DataSource, ...] = ()
    notes: str | None = None


class Manifest(_Part):
    """What `manifest.yaml` holds."""

    format: Literal[1] = Field(description="Version of this format.")
    engine: Slug
    name: Slug
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    description: str = Field(min_length=1)
    licence: str = Field(min_length=1, description="SPDX identifier of the weights' licence.")
    architecture: dict[str, Any] = Field(description="The engine's own parameters of the model.")
    limits: dict[str, Any] = Field(default_factory=dict, description="The engine's own limits of inputs.")
    precisions: tuple[Precision, ...] = Field(min_length=1, description="First: the one used by default.")
    weights: FilePath = Field(description="The safetensors file that all precisions are made from.")
    programs: dict[Slug, dict[Precision, FilePath]] = Field(
        default_factory=dict, description="Graph files by program and precision."
    )
    assets: dict[Slug, FilePath] = Field(
        default_factory=dict, description="Tokenizers and the like, by role."
    )
    scores: dict[str, Any] = Field(
        default_factory=dict, description="Measured quality, as the card states it."
    )
    provenance: Provenance
    unverified: tuple[FilePath, ...] = Field(
        (), description="Files and directories for people, which are never loaded and not listed in files."
    )
    files: tuple[BundleFile, ...] = Field(description="Every other file but the manifest.")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        listed = [file.path for file in self.files]
        repeated = sorted({path for path in listed if listed.count(path) > 1})
        if repeated:
            raise ValueError(f"files: {repeated[0]!r} is listed twice")
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError("precisions: one is listed twice")
        if MANIFEST in listed:
            raise ValueError(f"files: {MANIFEST!r} cannot list itself")
        for field, path in self._references():
            if path not in listed:
                raise ValueError(f"{field}: {path!r} is not listed in files")
        for name, graphs in self.programs.items():
            missing = [precision for precision in self.precisions if precision not in graphs]
            unknown = [precision for precision in graphs if precision not in self.precisions]
            if missing:
                raise ValueError(f"programs.{name}: there is no graph for precision {missing[0]!r}")
            if unknown:
                raise ValueError(f"programs.{name}.{unknown[0]}: not one of precisions")
        return self

    def _references(self) -> Iterator[tuple[str, str]]:
        yield "weights", self.weights
        for name, graphs in self.programs.items():
            for precision, path in graphs.items():
                yield f"programs.{name}.{precision}", path
        for name, path in self.assets.items():
            yield f"assets.{name}", path


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest was read and found consistent. Its files have not been looked at."""

    directory: Path
    manifest: Manifest

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.directory / self.manifest.weights

    def precision(self, wanted: str | None) -> Precision:
        """The precision to serve: the wanted one, or the bundle's first.

        Raises:
            BundleError: the bundle does not have it.
        """
        for precision in self.manifest.precisions:
            if wanted in (None, precision):
                return precision
        offered = ", ".join(self.manifest.precisions)
        raise BundleError(f"{self.manifest.name}: precision must be one of {offered}, not {wanted!r}")

    def graph(self, program: str, precision: Precision) -> Path:
        """The graph file of a program. Raises BundleError."""
        path = self.manifest.programs.get(program, {}).get(precision)
        if path is None:
            raise BundleError(f"{self.manifest.name}: programs.{program}.{precision} is missing")
        return self.directory / path

    def asset(self, role: str) -> Path:
        """The file with a role, for example ``tokenizer``. Raises BundleError."""
        path = self.manifest.assets.get(role)
        if path is None:
            raise BundleError(f"{self.manifest.name}: assets.{role} is missing")
        return self.directory / path


_GPU_PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "torch": ("float32", "bfloat16"),
    "tensorrt": ("float32", "float16", "bfloat16"),
}


def gpu_precision(backend: str, wanted: str | None, also: tuple[Precision, ...] = ()) -> Precision:
    """The precision that PyTorch or TensorRT computes in; what graphs the bundle has does not matter.

    Args:
        backend: ``torch``: weights serve any precision; ``tensorrt``: graphs are rewritten.
        wanted: None: float32.
        also: what the engine computes in besides.

    Raises:
        BundleError: it is none of the backend's.
    """
    found = (*_GPU_PRECISIONS[backend], *also)
    for precision in found:
        if wanted in (None, precision):
            return precision
    offered = ", ".join(found)
    raise BundleError(f"precision must be one of {offered} with the backend {backend}, not {wanted!r}")


def load_manifest(directory: Path | str) -> Manifest:
    """Read and check a bundle's manifest. Raises BundleError."""
    path = Path(directory) / MANIFEST
    try:
        values = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path}: must hold a mapping")
    return _checked(path, values)


def load_bundle(bundle: Path | str) -> Bundle:
    """Load a bundle given by directory or by name (see `resolve`). Raises BundleError."""
    directory = resolve(bundle)
    return Bundle(directory, load_manifest(directory))


def search_path() -> list[Path]:
    """Where bundles are looked for: REALTIDE_MODELS, ./models, and the source tree's models.

    Raises:
        BundleError: REALTIDE_MODELS cannot be understood.
    """
    source_tree = Path(realtide.__file__).resolve().parent.parent
    places = [*_environment(), Path("models")]
    if (
        source_tree / "pyproject.toml"
    ).is_file():  # an editable installation or a checkout, not site-packages
        places.append(source_tree / "models")
    unique: dict[Path, Path] = {}
    for place in places:
        unique.setdefault(place.resolve(), place)
    return list(unique.values())


def find_bundles(places: Sequence[Path | str] | None = None) -> dict[str, Path]:
    """Directories with a manifest, by directory name; the first place that has a name wins.

    Args:
        places: bundles, or directories of bundles; `search_path` by default. What does not exist is passed
            over.
    """
    found: dict[str, Path] = {}
    for place in search_path() if places is None else map(Path, places):
        for manifest in (place / MANIFEST, *sorted(place.glob(f"*/{MANIFEST}"))):
            if manifest.is_file():
                found.setdefault(manifest.resolve().parent.name, manifest.parent)
    return found


def resolve(bundle: Path | str) -> Path:
    """The directory of a bundle given by its path or by its name in `search_path`.

    Raises:
        BundleError: there is none.
    """
    path = Path(bundle)
    if (path / MANIFEST).is_file():
        return path
    text = str(bundle)
    if isinstance(bundle, str) and len(PurePosixPath(text).parts) == 1:
        found = find_bundles()
        if text in found:
            return found[text]
        places = ", ".join(map(str, search_path()))
        raise BundleError(
            f"there is no bundle {text!r}: neither a directory with a {MANIFEST} nor in {places}"
        )
    raise BundleError(f"there is no bundle {text!r}: it is no directory with a {MANIFEST}")


def verify(bundle: Bundle, on_file: Callable[[BundleFile], None] | None = None) -> list[str]:
    """Compare a bundle's files with its manifest.

    Args:
        bundle: what to check.
        on_file: called before each file is read, for showing progress.

    Returns:
        One sentence for each problem: files that are missing, altered, unreadable or not listed. Empty if
        all is well.
    """
    problems = []
    root = bundle.directory.resolve()
    for file in bundle.manifest.files:
        path = root / file.path
        if not path.is_file():
            problems.append(f"{file.path}: is missing")
            continue
        if not path.resolve().is_relative_to(root):
            problems.append(f"{file.path}: is a link that leads out of the bundle")
            continue
        if on_file is not None:
            on_file(file)
        try:
            size, sha256 = _digest(path)
        except OSError as error:
            problems.append(f"{file.path}: {error.strerror}")
            continue
        if size != file.size:
            problems.append(f"{file.path}: has {size} bytes, the manifest says {file.size}")
        elif sha256 != file.sha256:
            problems.append(f"{file.path}: SHA-256 is {sha256}, the manifest says {file.sha256}")
    listed = {file.path for file in bundle.manifest.files}
    for name in _contents(root, bundle.manifest.unverified):
        if name not in listed:
            problems.append(f"{name}: is not listed in the manifest")
    return problems


def write_manifest(directory: Path | str, values: Mapping[str, Any]) -> Manifest:
    """Write a bundle's manifest, with size and SHA-256 of every file that is there now.

    Args:
        directory: the bundle, with all its files in place.
        values: the fields of `Manifest` without ``files``.

    Raises:
        BundleError: a field is missing or wrong, or names a file that is not there; nothing is written.
    """
    root = Path(directory)
    if "files" in values:
        raise BundleError(f"{root / MANIFEST}: files: is computed, do not give it")
    unverified = values.get("unverified", ())
    files = []
    for name in _contents(root.resolve(), unverified if isinstance(unverified, (list, tuple)) else ()):
        size, sha256 = _digest(root / name)
        files.append({"path": name, "size": size, "sha256": sha256})
    manifest = _checked(root / MANIFEST, {"format": 1, **values, "files": files})
    text = yaml.safe_dump(
        manifest.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=100
    )
    (root / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _checked(path: Path, values: Mapping[Any, Any]) -> Manifest:
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        message = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BundleError(f"{path}: {where + ': ' if where else ''}{message}{more}") from error


def _environment() -> list[Path]:
    text = os.environ.get(SEARCH_PATH, "").strip()
    if not text.startswith("["):
        return [Path(part.strip()) for part in text.split(",") if part.strip()]
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{SEARCH_PATH}: not valid JSON: {error}") from error
    places = []
    for entry in entries:
        # The server's setting of the same name may give a model's other settings with its bundle.
        place = entry.get("bundle") if isinstance(entry, dict) else entry
        if not isinstance(place, str) or not place:
            raise BundleError(f"{SEARCH_PATH}: {json.dumps(entry)} names no bundle")
        places.append(Path(place))
    return places


def _contents(root: Path, unverified: Sequence[str]) -> list[str]:
    """Files of a bundle, sorted, without the manifest, hidden ones and those that are not verified."""
    names = []
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        outside = any(name == part or name.startswith(f"{part}/") for part in unverified)
        if not hidden and not outside and name != MANIFEST and not path.is_dir():
            names.append(name)
    return sorted(names)


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
