"""Fixtures of the API tests: one server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.helpers import Server, serve, write_tokenizer
from tests.serving.helpers import write_tiny_model


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tokenizer of single bytes and a chat template."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def server(tokenizer_directory: Path) -> Iterator[Server]:
    """A server without a key, for tests that do not disturb each other."""
    with serve(tokenizer_directory) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random Llama with a tokenizer of single bytes."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
