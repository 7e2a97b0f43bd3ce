"""A client that goes away leaves nothing behind: no request, no page, no task."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.helpers import SECONDS, Server, serve, wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def slow_server(tokenizer_directory: Path) -> Iterator[Server]:
    with serve(tokenizer_directory, step_seconds=0.005) as running:
        yield running


def send(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    connection.sendall(head + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body", "num_requests"),
    [
        (CHAT, {"messages": HELLO, "n": 3}, 1),
        (COMPLETIONS, {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 500}, 3),
    ],
)
def test_leaving_cancels(
    slow_server: Server, stream: bool, path: str, body: dict[str, Any], num_requests: int
) -> None:
    connection = send(slow_server, path, {**body, "stream": stream})
    wait_until(lambda: slow_server.client.num_in_flight == num_requests)
    if stream:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    wait_until(lambda: bool(slow_server.engine.scheduler.cache.references))
    connection.close()
    wait_until(slow_server.is_idle, 2.0)
    assert slow_server.engine.scheduler.num_steps < 400
    assert 'request_success_total{finished_reason="abort"' in slow_server.get("/metrics").text


def test_leaving_before_the_first_token_cancels(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory) as server:
        server.executor.release.clear()
        connections = [send(server, CHAT, {"messages": HELLO, "stream": stream}) for stream in (True, False)]
        wait_until(lambda: server.client.num_in_flight == 2)
        for connection in connections:
            connection.close()
        wait_until(lambda: server.client.num_in_flight == 0)
        server.executor.release.set()
        wait_until(server.is_idle)


def test_leaving_in_the_middle_of_the_body(slow_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", slow_server.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert slow_server.get("/health").status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_stays_is_served_meanwhile(slow_server: Server) -> None:
    leavers = [send(slow_server, CHAT, {"messages": HELLO, "stream": True}) for _ in range(5)]
    for connection in leavers:
        connection.recv(64)
        connection.close()
    response = slow_server.post(CHAT, {"messages": HELLO, "max_tokens": 8})
    assert response.json()["usage"]["completion_tokens"] == 8
    wait_until(slow_server.is_idle)


def test_one_failing_prompt_cancels_the_others(slow_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    add = slow_server.engine.add_request

    def refuse_second(request: Any) -> None:
        if request.request_id.endswith("-1"):
            raise RuntimeError("no")
        add(request)

    monkeypatch.setattr(slow_server.engine, "add_request", refuse_second)
    response = slow_server.post(COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 500})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    wait_until(slow_server.is_idle, 2.0)
