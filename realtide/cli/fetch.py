"""`realtide models fetch`: a bundle from an archive on the network, for containers that start without one."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO

import typer

from realtide.cli.errors import CommandError, UsageError

_CHUNK = 1 << 20
_TIMEOUT = 60.0


def command(
    url: Annotated[str, typer.Argument(metavar="URL", help="A .tar.gz or .tar of one bundle's directory.")],
    sha256: Annotated[str, typer.Option(help="What the archive must have; 64 hexadecimal digits.")],
    into: Annotated[Path, typer.Option(help="Directory of bundles.", file_okay=False)] = Path("models"),
) -> None:
    """Fetch a bundle, compare it with its SHA-256 and its manifest, and put it into a directory of bundles.

    Nothing is unpacked before the archive's SHA-256 is right, and nothing is in place before every file is as
    the manifest says. A bundle that is there already and came from the same archive is left as it is.

    Example: realtide models fetch https://models.example.com/words.tar.gz --sha256 SHA256 --into /models
    """
    wanted = sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise UsageError(f"--sha256 must be 64 hexadecimal digits, got {sha256!r}")
    if not re.match(r"(https?|file)://", url):
        raise UsageError(f"{url!r} must start with https://, http:// or file://")
    mark = into / f".fetched-{wanted}"
    if mark.is_file() and (into / mark.read_text() / "manifest.yaml").is_file():
        typer.echo(f"{mark.read_text()}: is there")
        return
    try:
        into.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that it gets there in one step.
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=into) as directory:
            name = _install(url, wanted, Path(directory), into)
        mark.write_text(name)
    except OSError as error:
        raise CommandError(f"{url}: {error}") from error
    typer.echo(f"{name}: fetched")


def _refuse_what_is_no_bundle(tar: tarfile.TarFile) -> None:
    """Raises TarError for all but files and directories below the place to unpack to."""
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise tarfile.TarError(f"{member.name!r} would be outside the destination")
        if not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} is neither a file nor a directory")


def _install(url: str, sha256: str, scratch: Path, into: Path) -> str:
    """Download, check, unpack, check again, and move; the bundle's name."""
    from realtide import bundle

    archive = scratch / "archive"
    with archive.open("wb") as file:
        found = _download(url, file)
    if found != sha256:
        raise CommandError(f"{url}: SHA-256 is {found}, not {sha256}")
    unpacked = scratch / "unpacked"
    try:
        with tarfile.open(archive) as tar:
            _refuse_what_is_no_bundle(tar)
            # Python 3.11 has filters since 3.11.4; those before it take no notice of this.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(unpacked)
    except tarfile.TarError as error:
        raise CommandError(f"{url}: cannot be unpacked: {str(error).splitlines()[0]}") from error
    archive.unlink()
    directories = list(bundle.find_bundles([unpacked]).values())
    if len(directories) != 1:
        raise CommandError(f"{url}: must hold one bundle, has {len(directories)}")
    try:
        loaded = bundle.load_bundle(directories[0])
    except bundle.BundleError as error:
        raise CommandError(f"{url}: {error}") from error
    problems = bundle.verify(loaded)
    if problems:
        raise CommandError(f"{url}: {'; '.join(problems)}")
    target = into / loaded.manifest.name
    if target.exists():
        shutil.rmtree(target)
    directories[0].rename(target)
    return loaded.manifest.name


def _download(url: str, file: BinaryIO) -> str:
    """Write what is at `url` to `file`; its SHA-256."""
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
            while chunk := reply.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except urllib.error.HTTPError as error:
        error.close()  # it is the reply, too
        raise CommandError(f"{url}: {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise CommandError(f"{url}: {getattr(error, 'reason', None) or error}") from error
    return digest.hexdigest()
