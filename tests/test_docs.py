"""The documentation says what is there: links, commands, options, paths, metrics, and examples that run."""

from __future__ import annotations

import asyncio
import doctest
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import typer

from realtide.cli.main import app
from realtide.server.app import Server
from realtide.server.config import CLIENT_VARIABLES, ServerConfig
from tests.engines.easycontrol.small import Small
from tests.server.engine import BurstEngine, quiet, tone
from tests.server.helpers import DEFAULTS
from tests.server.image_helpers import picture
from tests.server.video_engine import ClipEngine

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "models" / "ancat-commands-en" / "recipe"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "clients").glob("*/*.md"),
        *(ROOT / "models").glob("*/*.md"),
        RECIPE / "README.md",
        ROOT / "tests" / "data" / "audio" / "NOTICE.md",
    ]
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TREE = re.compile(r"(?:realtide|docs|tests|models|clients|proto|benchmarks|tools|deploy)/[\w./-]+")
WRITTEN = ("benchmarks/results", "docs/sweep")  # by commands on the same pages

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks in one of these languages."""
    return [body for _, language, body in FENCE.findall(page.read_text()) if language in languages]


def indented(page: Path) -> list[str]:
    """Commands of ours in indented blocks; what follows two spaces explains them."""
    joined = re.sub(r" *\\\n +", " ", prose(page))
    lines = re.findall(r"^    ((?:realtide|make|python|pip) .+)$", joined, re.M)
    return [line.split("  ")[0] for line in lines]


def anchors(page: Path) -> set[str]:
    """Fragments that a page's headings can be linked by, as GitHub makes them."""
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ +(.+)$", prose(page), re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), f"{target}: there is no such file"
        if fragment:
            assert fragment in anchors(file), f"{target}: there is no such heading"


def test_the_index_lists_every_page() -> None:
    linked = {(ROOT / "docs" / name).resolve() for name in LINK.findall(prose(ROOT / "docs" / "index.md"))}
    assert linked >= set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "index.md"}


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for code in INLINE.findall(prose(page)):
        if not TREE.fullmatch(code) or code.startswith(WRITTEN):
            continue
        # realtide/v1 is a package of the contract
        assert any((base / code).exists() for base in (ROOT, ROOT / "proto")), code


@pages
def test_metrics_and_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    table = (ROOT / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(\w+)`", table, re.M))
    assert len(known) > 30
    for name in re.findall(r"\brealtide_\w+", text):
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        if not bare.startswith("realtide_client"):
            assert bare in known or bare == "realtide_", name
    settings = {f"REALTIDE_{name.upper()}" for name in ServerConfig.model_fields}
    settings |= {"REALTIDE_CONFIG", *CLIENT_VARIABLES}
    for name in re.findall(r"\bREALTIDE_[A-Z_]+", text):
        assert name in settings or name == "REALTIDE_", name


# Commands


def commands_of(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words or "&&" in words:
            cut = min(words.index(mark) for mark in ("|", "&&") if mark in words)
            yield words[:cut]
            words = words[cut + 1 :]
        yield words


def check(words: list[str], page: Path, *, complete: bool) -> None:
    """Raise AssertionError for a command that is ours and would be refused as it stands."""
    match words:
        case ["realtide", *rest]:
            check_realtide(rest, complete=complete)
        case ["make", *rest]:
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert all(word in targets for word in rest if "=" not in word), words
        case ["python", script, *rest] if script.endswith(".py"):
            found = [base / script for base in (ROOT, page.parent, RECIPE) if (base / script).is_file()]
            assert found, f"{script}: there is no such script"
            source = found[0].read_text()
            for word in rest:
                assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in source, words
        case ["pip", "install", *rest]:
            table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for word in rest:
                for names in re.findall(r"^(?:\.|realtide)\[(.*)\]$", word):
                    assert set(names.split(",")) <= set(table), words


def check_realtide(words: list[str], *, complete: bool) -> None:
    """Walk to the command and look its options up; `complete`: required ones must be there."""
    command: Any = typer.main.get_command(app)
    queue = list(words)
    while hasattr(command, "commands") and queue and not queue[0].startswith("-"):
        name = queue.pop(0)
        if name.isupper():  # a placeholder
            return
        assert name in command.commands, f"realtide {shlex.join(words)}: no command {name}"
        command = command.commands[name]
    options = {name: param for param in command.params for name in (*param.opts, *param.secondary_opts)}
    seen, free = set[str](), 0
    while queue:
        word, _, value = queue.pop(0).partition("=")
        if not word.startswith("-") or word == "-":
            free += 1
        elif word not in ("--help", "-h"):
            assert word in options, f"realtide {shlex.join(words)}: no option {word}"
            seen.add(options[word].name)
            if not getattr(options[word], "is_flag", False) and not value:
                # As many words as its placeholder has: --at SECONDS PROMPT.
                for _ in (options[word].metavar or "one").split():
                    assert queue, f"realtide {shlex.join(words)}: {word} has no value"
                    queue.pop(0)
    places = [param for param in command.params if param.param_type_name == "argument"]
    room = any(param.nargs == -1 for param in places) or free <= sum(param.nargs for param in places)
    assert room, f"realtide {shlex.join(words)}: too many arguments"
    if complete:
        assert not hasattr(command, "commands"), f"realtide {shlex.join(words)}: no command"
        needed = {param.name for param in command.params if param.required} - {param.name for param in places}
        assert needed <= seen, f"realtide {shlex.join(words)}: {needed - seen} not given"
        assert free >= sum(param.required for param in places), (
            f"realtide {shlex.join(words)}: too few arguments"
        )


@pages
def test_commands_would_be_accepted(page: Path) -> None:
    for script in [*blocks(page, "sh", "bash", ""), *indented(page)]:
        for words in commands_of(script):
            check(words, page, complete=True)
    for code in INLINE.findall(prose(page)):
        if re.match(r"(realtide|make|python|pip) [^=]", code):
            check(shlex.split(code), page, complete=False)


def test_recipes_of_the_makefile_would_be_accepted() -> None:
    text = (ROOT / "Makefile").read_text()
    found = re.findall(r"^\t@?\$\(BIN\)/(realtide .*)$", text, re.M)
    assert found
    for line in found:
        check(shlex.split(line), ROOT / "Makefile", complete=True)


@pytest.mark.parametrize(
    "line",
    [
        "realtide sing",
        "realtide models burn",
        "realtide serve --prot 1",
        "realtide serve --port",
        "realtide transcribe a.wav b.wav",
        "realtide video --out a.mp4",
        "realtide video --prompt a --at 3",
        "realtide video --prompt a --at 3 b c",
        "realtide bench lookahead",
        "realtide models",
        "make coffee",
        "python benchmarks/nothing.py",
        "python benchmarks/memory.py --bundel X",
        "pip install -e .[cpu,nothing]",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(line), ROOT / "README.md", complete=True)


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        for last in getattr(command, "commands", {"": None}):
            assert f"`realtide {name} {last}".rstrip() in text, (name, last)


@pytest.mark.parametrize("page", ["speech-api.md", "video-api.md", "image-api.md"])
def test_names_of_the_contract_that_the_api_pages_use_exist(page: str) -> None:
    sources = [
        *(ROOT / "proto" / "realtide" / "v1").glob("*.proto"),
        *(ROOT / "clients" / "python" / "realtide_client").glob("*.py"),
        ROOT / "realtide" / "cli" / "display.py",
        ROOT / "realtide" / "server" / "config.py",
    ]
    known = set(re.findall(r"\w+", "\n".join(source.read_text() for source in sources)))
    names = [
        name
        for code in INLINE.findall(prose(ROOT / "docs" / page))
        for name in re.findall(r"\w*_\w+", code)
        if not code.startswith(("realtide/", "proto/"))
    ]
    assert len(names) > 20
    assert not set(names) - known


# Examples


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that runs while the examples do: tone bursts are words, frames are flat, images noise."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    images: Any = Small().engine
    server = Server(ServerConfig(**DEFAULTS), [BurstEngine(), ClipEngine(), images])
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    yield f"127.0.0.1:{server.port}"
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
    if "connect(" in code
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(
    code: str,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each talks to a real server; only the address, the recording and the pace differ from the page."""
    recording = tmp_path / "bursts.wav"
    pieces = [quiet(0.2), tone(0.2), quiet(0.2), tone(0.2), quiet(0.4)]
    soundfile.write(recording, np.concatenate(pieces), 16000, subtype="PCM_16")
    code, addresses = re.subn(r'"localhost:50051"', f'"{address}"', code)
    code, recordings = re.subn(r'(soundfile\.read\()"[^"]+"', rf'\1"{recording}"', code)
    code = re.sub(r"asyncio\.sleep\([\d.]+\)", "asyncio.sleep(0.001)", code)
    video, image = ".video(" in code, ".image(" in code
    assert (addresses, recordings) == (1, 0 if video or image else 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sketch.png").write_bytes(picture(len(code)))  # that no other example has
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    output = capsys.readouterr().out
    if image:
        assert "0 cached 1 computed" in output
        assert "1 cached 0 computed" in output
        assert len(list(tmp_path.glob("fox-*.png"))) == 2
    elif not video:
        assert "burst2" in output
    elif ".mp4" not in code:
        assert "shows the new prompt" in output
    else:
        assert "a red apple" in output
        (film,) = tmp_path.glob("*.mp4")
        with av.open(str(film)) as container:
            assert len(list(container.decode(video=0))) > 30


def test_commands_in_indented_blocks_are_seen() -> None:
    found = indented(ROOT / "docs" / "benchmarks.md")
    assert "realtide bench speech --engine-only" in found
    assert any(line.startswith("realtide bench lookahead --point ") and "--out" in line for line in found)


def test_there_are_examples() -> None:
    names = {str(param.id).rpartition("-")[0] for param in EXAMPLES}
    assert names >= {
        "README.md",
        "docs/speech-api.md",
        "docs/video-api.md",
        "docs/image-api.md",
        "clients/python/README.md",
    }


def test_the_engines_page_computes_what_it_says() -> None:
    page = ROOT / "docs" / "ancat.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted >= 5
    assert result.failed == 0
