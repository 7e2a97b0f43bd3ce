"""Junk never gives a 500, and the server serves on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.helpers import scripted_client
from tokenloom.api.app import create_app
from tokenloom.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from tokenloom.api.unsupported import HARMLESS_FIELDS, REFUSED
from tokenloom.config import Config

KINDS: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}
EXPECTED = {200, 400, 404, 413, 429}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["user", "assistant", "system", "tool", "text", "scripted", "\ud800", "\x00"])
)
junk = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "3", ""])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A path and a body that is nearly right: some fields of a good one replaced by junk."""
    path = draw(st.sampled_from(sorted(GOOD)))
    names = sorted({*KINDS[path].__struct_encode_fields__, *REFUSED, *HARMLESS_FIELDS})
    fields = draw(st.dictionaries(st.sampled_from(names), junk, max_size=3))
    return path, {**GOOD[path], **fields}


class Face:
    """The application on an event loop that outlives the examples."""

    def __init__(self, directory: Path) -> None:
        self.runner = asyncio.Runner()
        self.client = scripted_client(directory)
        self.runner.run(self.client.start())
        transport = httpx.ASGITransport(create_app(self.client, Config()))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self.runner.run(asyncio.wait_for(self.http.post(path, content=content), 20))

    def close(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(scope="module")
def face(tokenizer_directory: Path) -> Any:
    made = Face(tokenizer_directory)
    yield made
    made.close()


def check(face: Face, path: str, content: bytes) -> None:
    response = face.post(path, content)
    assert response.status_code in EXPECTED, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 1000
    elif "data: " in response.text[:6]:
        assert '"error"' not in response.text
    assert face.client.num_in_flight == 0


@settings(max_examples=300)
@given(body=bodies())
def test_nearly_right_bodies(face: Face, body: tuple[str, Any]) -> None:
    path, value = body
    check(face, path, json.dumps(value).encode())


@settings(max_examples=100)
@given(path=st.sampled_from(sorted(GOOD)), value=junk)
def test_junk_bodies(face: Face, path: str, value: Any) -> None:
    check(face, path, json.dumps(value).encode())


@settings(max_examples=100)
@given(path=st.sampled_from(sorted(GOOD)), content=st.binary(max_size=60))
def test_junk_bytes(face: Face, path: str, content: bytes) -> None:
    check(face, path, content)


def test_it_still_serves(face: Face) -> None:
    for path, body in GOOD.items():
        assert face.post(path, json.dumps(body).encode()).status_code == 200
