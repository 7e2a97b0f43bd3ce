"""What clients see while the engine loads, restarts, fails, or dies under their request."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import pytest

from tests.api.helpers import POISON, SECONDS, scripted_client, serve, wait_until
from tokenloom.api.app import create_app
from tokenloom.config import Config, make_config
from tokenloom.engine.request import Request
from tokenloom.errors import EngineDead
from tokenloom.serving.client import EngineState, ModelCard
from tokenloom.serving.local_client import ThreadEngineClient
from tokenloom.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


class LoadingClient(ThreadEngineClient):
    """Never gets ready, and has no card."""

    @property
    def state(self) -> EngineState:
        return "loading"

    @property
    def card(self) -> ModelCard:
        raise EngineDead("the engine is loading")

    @property
    def tokenizer(self) -> Tokenizer:
        raise AssertionError("nobody may tokenise while the engine loads")

    async def start(self) -> None:
        return

    async def close(self) -> None:
        return


@pytest.fixture
def loading(tokenizer_directory: Path) -> httpx.AsyncClient:
    scripted = scripted_client(tokenizer_directory)
    client = LoadingClient(scripted._engine, scripted._tokenizer, scripted.card)
    app = create_app(client, make_config({}, env={}))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_loading(loading: httpx.AsyncClient) -> None:
    for path in ("/health", "/ping"):
        response = await loading.get(path)
        assert response.status_code == 503
        assert response.json()["state"] == "loading"
        assert int(response.headers["retry-after"]) >= 1
    for method, path, body in [
        ("POST", CHAT, {"messages": HELLO}),
        ("POST", "/v1/completions", {"prompt": "x"}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/x", None),
    ]:
        response = await loading.request(method, path, json=body)
        assert response.status_code == 503, path
        assert response.headers["retry-after"]
        error = response.json()["error"]
        assert error["code"] == "engine_unavailable"
        assert "loading" in error["message"]
    assert (await loading.get("/version")).json()["numerics"] is None
    assert (await loading.get("/metrics")).status_code == 200
    assert (await loading.get("/docs")).status_code == 200


def test_ready(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory) as server:
        response = server.get("/health")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ok",
            "state": "ready",
            "model": "scripted",
            "num_in_flight": 0,
            "detail": None,
        }


def test_death_of_the_engine(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, step_seconds=0.005) as server:
        body = json.dumps({"messages": HELLO, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            received = connection.recv(64)
            assert received.startswith(b"HTTP/1.1 200")
            response = server.post("/v1/completions", {"prompt": [POISON], "max_tokens": 4})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
            assert response.headers["retry-after"]
            while data := connection.recv(1 << 16):
                received += data
        events = [line for line in received.decode().splitlines() if line.startswith("data: ")]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable"
        assert error["code"] == "engine_unavailable"
        assert "data: [DONE]" not in events
        wait_until(lambda: server.client.state == "failed")
        health = server.get("/health")
        assert health.status_code == 503
        assert health.json()["state"] == "failed"
        assert "poisoned" in health.json()["detail"]
        assert server.post(CHAT, {"messages": HELLO}).status_code == 503


async def test_an_unexpected_error_is_a_bare_500(
    tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = scripted_client(tokenizer_directory)

    def generate(request: Request) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(client, "generate", generate)
    await client.start()
    transport = httpx.ASGITransport(create_app(client, Config()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["type"] == "server_error"
    await client.close()
