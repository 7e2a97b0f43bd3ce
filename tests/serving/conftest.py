"""Fixtures of the serving tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serving.helpers import write_tiny_model, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tokenizer of single bytes."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random Llama with the tokenizer of single bytes."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """Child processes find `tokenloom` and `tests`, wherever the tests were started."""
    monkeypatch.setenv("PYTHONPATH", str(repository), prepend=os.pathsep)
