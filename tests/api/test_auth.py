"""The API key guards every route but the two probes; request ids come back clean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.helpers import Server, serve
from tokenloom.api.auth import clean_request_id
from tokenloom.api.endpoints import ENDPOINTS

KEY = "s3cret-kéy"


@pytest.fixture(scope="module")
def locked(tokenizer_directory: Path) -> Iterator[Server]:
    with serve(tokenizer_directory, api_key=KEY) as running:
        yield running


@pytest.mark.parametrize(
    "path", [*(entry.path for entry in ENDPOINTS), "/docs", "/openapi.json", "/v1/nothing", "/"]
)
def test_every_route_needs_the_key(locked: Server, path: str) -> None:
    path = path.replace("{model:path}", "scripted")
    is_open = path in ("/health", "/ping")
    for send in (locked.get, locked.post):
        for value in (None, "Bearer", "Bearer wrong", "Basic " + KEY, KEY, f"Bearer {KEY}x", "Bearer \xff"):
            headers = {} if value is None else {"Authorization": value.encode("utf-8")}
            response = send(path, headers=headers)
            if is_open:
                assert response.status_code in (200, 405)
            else:
                assert response.status_code == 401, value
                assert response.headers["www-authenticate"] == "Bearer"
                error = response.json()["error"]
                assert error["code"] == "invalid_api_key"
                assert KEY not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens(locked: Server, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEY}".encode()}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.get("/metrics", headers=headers).status_code == 200
    assert locked.get("/v1/nothing", headers=headers).status_code == 404
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert locked.post("/v1/chat/completions", body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [("abc-1.2_3:4", "abc-1.2_3:4"), ("a b\tc<script>", "abcscript"), ("x" * 500, "x" * 128)],
)
def test_request_ids_are_cleaned(server: Server, given: str, cleaned: str) -> None:
    assert clean_request_id(given) == cleaned
    assert server.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] == cleaned


def test_request_ids_are_made(server: Server) -> None:
    first, second = (server.get("/v1/nothing").headers["x-request-id"] for _ in range(2))
    assert first != second
    assert clean_request_id("\r\n\x00") != ""
    same = {"X-Request-Id": "same"}
    body = {"prompt": ["a", "b"], "max_tokens": 1}
    ids = {server.post("/v1/completions", body, headers=same).json()["id"] for _ in range(3)}
    assert len(ids) == 3
