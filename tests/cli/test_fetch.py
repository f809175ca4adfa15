"""`realtide models fetch`, from files and from a real HTTP server."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_models import tiny

__all__ = ["tiny"]


def pack(archive: Path, source: Path, **extra: bytes) -> str:
    """Pack a bundle, and more files; the archive's SHA-256."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname="anything")
        for name, content in extra.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_bundle_comes_over_http_and_once_only(run: Run, tiny: Path, tmp_path: Path, served: str) -> None:
    digest = pack(tmp_path / "tiny.tar.gz", tiny)
    arguments = ("models", "fetch", f"{served}/tiny.tar.gz", "--sha256", digest.upper(), "--into", "there")
    assert run(*arguments).out == "tiny: fetched\n"
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"tiny", f".fetched-{digest}"}
    assert run("models", "verify", "there/tiny").out == "tiny: ok\n"
    (tmp_path / "tiny.tar.gz").unlink()
    assert run(*arguments).out == "tiny: is there\n"


def test_a_newer_archive_takes_the_place_of_the_older(run: Run, tiny: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tiny.tar"
    url = archive.as_uri()
    assert run("models", "fetch", url, "--sha256", pack(archive, tiny), "--into", "there").code == 0
    manifest = tiny / "manifest.yaml"
    manifest.write_text(manifest.read_text().replace("0.1.0", "0.2.0"))
    assert run("models", "fetch", url, "--sha256", pack(archive, tiny), "--into", "there").code == 0
    assert "version: 0.2.0" in (tmp_path / "there" / "tiny" / "manifest.yaml").read_text()


def test_what_is_not_as_it_should_be_is_not_put_in_place(run: Run, tiny: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tiny.tar.gz"
    url = archive.as_uri()

    def refused(sha256: str, sentence: str) -> None:
        done = run("models", "fetch", url, "--sha256", sha256, "--into", "there")
        assert done.code == 1
        assert sentence in done.err
        assert len(done.err.splitlines()) == 1
        assert list((tmp_path / "there").glob("*")) == []
        assert not (tmp_path / "evil").exists()

    pack(archive, tiny)
    refused("0" * 64, "SHA-256 is ")
    refused(pack(archive, tiny, **{"..__evil": b"x"}), "cannot be unpacked")
    refused(pack(archive, tiny, anything__more=b"x"), "more: is not listed in the manifest")
    refused(
        pack(archive, tiny, second__manifest=b"x", **{"other__manifest.yaml": b"{}"}), "must hold one bundle"
    )
    (tiny / "weights.safetensors").write_bytes(b"altered")
    refused(pack(archive, tiny), "weights.safetensors: SHA-256 is")
    archive.write_bytes(b"no archive")
    refused(hashlib.sha256(b"no archive").hexdigest(), "cannot be unpacked")
    archive.unlink()
    refused("0" * 64, "No such file")


@pytest.mark.parametrize(
    ("url", "sha256", "sentence"),
    [
        ("https://example.com/a.tar", "12", "64 hexadecimal digits"),
        ("ftp://example.com/a.tar", "0" * 64, "must start with"),
    ],
)
def test_wrong_calls_are_refused(run: Run, url: str, sha256: str, sentence: str) -> None:
    done = run("models", "fetch", url, "--sha256", sha256)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err


def test_an_error_of_the_server_is_told(run: Run, served: str) -> None:
    done = run("models", "fetch", f"{served}/none.tar", "--sha256", "0" * 64)
    assert done.code == 1
    assert "/none.tar: Not Found" in done.err or "File not found" in done.err
