"""README and docs: examples run, commands work, links resolve, generated pages are up to date."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.serving_process import ServeProcess, serving
from tools import gen_docs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCAL = "http://127.0.0.1:8000"
EMBEDDED = ROOT / "tokenloom" / "embedded" / "target"
FORBIDDEN = {
    r"(?<![\w.:/])/(?:home|root|work|tmp|usr|opt|mnt)/": "an absolute path",
    r"\b(?:TODO|FIXME|XXX)\b": "an unfinished part",
}


class Block(NamedTuple):
    """A fenced block of a page: its info string and its text."""

    page: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2])


BLOCKS = list(blocks())
RUNNABLE = [block for block in BLOCKS if block.info == "python runnable"]
WITH_SERVER = [block for block in BLOCKS if block.info == "python runnable server"]
CURL = [
    (block, line.removeprefix("$ "))
    for block in BLOCKS
    if block.info == "console"
    for line in block.text.splitlines()
    if line.startswith("$ curl ")
]


def need_embedded_model() -> None:
    if not (EMBEDDED / "config.json").is_file():
        pytest.skip("no embedded model: tokenloom/embedded/target is not there")


def execute(text: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    need_embedded_model()
    with serving() as process:
        yield process


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_examples(block: Block, tmp_path: Path) -> None:
    if "LLM(" in block.text:
        need_embedded_model()
    execute(block.text, tmp_path)


@pytest.mark.parametrize("block", WITH_SERVER, ids=str)
def test_python_examples_with_a_server(block: Block, server: ServeProcess, tmp_path: Path) -> None:
    assert LOCAL in block.text
    execute(block.text.replace(LOCAL, server.url), tmp_path)


@pytest.mark.parametrize("number", range(len(CURL)), ids=lambda number: f"{CURL[number][0]}-{number}")
def test_curl_commands(number: int, server: ServeProcess) -> None:
    words = shlex.split(CURL[number][1])
    url = next(word for word in words if word.startswith(LOCAL)).replace(LOCAL, server.url)
    if "-d" in words:
        body = json.loads(words[words.index("-d") + 1])
        response = httpx.post(url, json=body, timeout=60)
        assert "text" in response.text or "content" in response.text
    else:
        response = httpx.get(url, timeout=60)
    assert response.status_code == 200, response.text


def test_every_python_block_says_whether_it_runs() -> None:
    assert [str(block) for block in BLOCKS if block.info.startswith("python")] == [
        str(block) for block in BLOCKS if block.info in ("python runnable", "python runnable server")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_forbidden_words(page: Path) -> None:
    for pattern, what in FORBIDDEN.items():
        found = re.search(pattern, page.read_text())
        assert found is None, f"{what}: {found[0] if found else ''}"


def test_every_page_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text()):
            waiting.append((page.parent / target).resolve())
    assert set(PAGES) <= seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_named_in_the_text_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:tokenloom|tools|tests|bench)/[\w/]+\.py\b", page.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_configuration_page_is_up_to_date() -> None:
    assert gen_docs.PAGE.read_text() == gen_docs.page(), "run: python tools/gen_docs.py"


def test_the_readme_names_no_command_that_does_not_exist() -> None:
    from tokenloom.cli.main import app, bench

    names = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    names |= {group.name for group in app.registered_groups if group.name}
    benches = {
        command.name or command.callback.__name__ for command in bench.registered_commands if command.callback
    }
    assert benches == {"roofline", "serve", "sweep", "throughput"}
    for page in PAGES:
        used = set(re.findall(r"^\$ tokenloom (\w+)", page.read_text(), re.MULTILINE))
        assert used <= names, page
