"""Adapters from the command line."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.serving.helpers import write_tiny_model
from tests.serving.peft_adapters import write_adapter
from tests.serving_process import ServeProcess, serving
from tokenloom.cli.main import app

OPTIONS = ("--dtype", "float32", "--threads", "1", "--num-pages", "2048")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def generated(model: Path, *args: str) -> str:
    result = CliRunner().invoke(
        app, ["generate", "ab", "--model", str(model), "--max-tokens", "12", *OPTIONS, *args]
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "x", 1)
    assert generated(model) != generated(model, "--adapter", str(adapter))
    result = CliRunner().invoke(
        app, ["generate", "ab", "--model", str(model), *OPTIONS, "--adapter", str(tmp_path / "nowhere")]
    )
    assert result.exit_code == 1
    assert "a directory, or the name of an adapter" in result.stderr


def test_serve(model: Path, tmp_path: Path) -> None:
    """Two named adapters, one in a directory; an answer of each through the whole server."""
    adapters = [write_adapter(tmp_path / name, i) for i, name in enumerate(("one", "two"))]
    write_adapter(tmp_path / "watched" / "three", 3)
    named = [part for path in adapters for part in ("--adapter", f"{path.name}={path}")]
    options = [str(model), *OPTIONS, *named, "--adapter-dir", str(tmp_path / "watched")]
    with serving(*options, "--served-model-name", "tiny") as server:
        texts = []
        for name in ("tiny", "one", "tiny:two", "three"):
            body = {"model": name, "prompt": "ab", "temperature": 0, "max_tokens": 12}
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
            assert response.status_code == 200, response.text
            texts.append(response.json()["choices"][0]["text"])
        assert len(set(texts)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "x"], "NAME=DIRECTORY"),
        (["--adapter", "x=nowhere"], "no directory nowhere"),
        (["--adapter", "x=LARGE", "--adapter", "x=nowhere"], "another name than that of"),
        (["--adapter", "x=LARGE", "--max-adapter-mb", "1"], "at most 1024 KiB"),
        (["--adapter", "x=LARGE", "--max-adapter-rank", "8"], "rank 220"),
        (["--adapter-dir", "nowhere"], "a directory of adapters that can be listed"),
    ],
)
def test_a_start_that_cannot_be(model: Path, tmp_path: Path, options: list[str], words: str) -> None:
    large = write_adapter(tmp_path / "large", 1, rank=220)
    server = ServeProcess(str(model), *OPTIONS, *(option.replace("LARGE", str(large)) for option in options))
    output = server.rest()
    assert server.stop() == 1
    assert words in output.splitlines()[-1]
    assert "Traceback" not in output
