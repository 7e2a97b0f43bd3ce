"""SLOs over HTTP: in the request, by class, by API key; they reach the engine and change no output."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.helpers import SECONDS, Server, serve
from tokenloom.engine.request import NO_SLO, Request, Slo

CLASSES = ["fast=tpot_ms:20,ttft_ms:300", "chat=tpot_ms:50"]
PATHS = ["/v1/completions", "/v1/chat/completions"]


def body(path: str, **more: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {**prompt, "max_tokens": 2, **more}


class Seen:
    """The requests that the engine of a server was given."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        add = server.engine.add_request

        def record(request: Request) -> None:
            self.requests.append(request)
            add(request)

        monkeypatch.setattr(server.engine, "add_request", record)

    def slos(self) -> list[Slo]:
        slos = [request.slo for request in self.requests]
        self.requests.clear()
        return slos


@pytest.fixture(scope="module")
def classed(tokenizer_directory: Path) -> Iterator[Server]:
    settings = {"slo_class": CLASSES, "policy": "slo"}
    with serve(tokenizer_directory, settings=settings) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tokenizer_directory: Path) -> Iterator[Server]:
    settings = {"slo_class": CLASSES, "slo_key": ["k-fast=fast", "k-chat=chat"]}
    with serve(tokenizer_directory, api_key="plain", settings=settings) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tpot_ms": 40, "ttft_ms": 500}, Slo(0.04, 0.5)),
        ({"tpot_ms": 12.5}, Slo(0.0125, inf)),
        ({"tpot_ms": None, "ttft_ms": 500}, Slo(inf, 0.5)),
        ({}, NO_SLO),
        (None, NO_SLO),
        ("fast", Slo(0.02, 0.3)),
        ("chat", Slo(0.05, inf)),
    ],
)
def test_an_slo_reaches_the_engine_and_changes_nothing(
    classed: Server, monkeypatch: pytest.MonkeyPatch, path: str, given: Any, expected: Slo
) -> None:
    plain = classed.post(path, body(path)).json()
    seen = Seen(classed, monkeypatch)
    answer = classed.post(path, body(path, slo=given, n=2))
    assert answer.status_code == 200, answer.text
    assert seen.slos() == [expected]
    for name in ("text", "message"):
        assert answer.json()["choices"][0].get(name) == plain["choices"][0].get(name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tpot_ms": 0}, "slo.tpot_ms"),
        ({"tpot_ms": -3.5}, "slo.tpot_ms"),
        ({"ttft_ms": 1e300}, "slo.ttft_ms"),
        ({"ttft_ms": "fast"}, "slo.ttft_ms"),
        ({"tpot_ms": True}, "slo.tpot_ms"),
        ({"tpot_ms": [40]}, "slo.tpot_ms"),
        ({"tpot_ms": 40, "xyz": 3}, "slo.xyz"),
        ({"tpot": 40}, "slo.tpot"),
        ({"a` - at `$.n": 1}, "slo.a` - at `$.n"),
        ("slow", "slo"),
        ("", "slo"),
        (40, "slo"),
        ([], "slo"),
        (True, "slo"),
    ],
)
def test_bad_values_are_refused_by_name(classed: Server, path: str, given: Any, param: str) -> None:
    answer = classed.post(path, body(path, slo=given))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert param in error["message"]
    assert classed.is_idle()


def test_numbers_that_are_none(classed: Server) -> None:
    for text in ("1e999", "-1e999", "NaN", "Infinity"):
        content = b'{"prompt": "x", "slo": {"tpot_ms": %b}}' % text.encode()
        answer = classed.post("/v1/completions", content=content)
        assert answer.status_code == 400, text
        assert answer.json()["error"]["code"] in ("invalid_value", "invalid_json", "invalid_type")


def test_a_server_without_classes_says_so(server: Server) -> None:
    answer = server.post("/v1/completions", body("/v1/completions", slo="fast"))
    assert answer.status_code == 400
    assert "--slo-class" in answer.json()["error"]["message"]


def test_a_key_has_a_class(keyed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(keyed, monkeypatch)
    for key, expected in [("plain", NO_SLO), ("k-fast", Slo(0.02, 0.3)), ("k-chat", Slo(0.05, inf))]:
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0, timeout=SECONDS) as client:
            client.completions.create(model="", prompt="x", max_tokens=1)
            client.completions.create(model="", prompt="x", max_tokens=1, extra_body={"slo": {"tpot_ms": 7}})
            client.completions.create(model="", prompt="x", max_tokens=1, extra_body={"slo": "chat"})
        assert seen.slos() == [expected, Slo(0.007, inf), Slo(0.05, inf)]


@pytest.mark.parametrize("key", ["k", "k-fas", "k-fast=fast", "fast"])
def test_other_keys_open_nothing(keyed: Server, key: str) -> None:
    answer = keyed.post(
        "/v1/completions", body("/v1/completions"), headers={"Authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 401


def test_keys_of_classes_alone_lock_the_server(tokenizer_directory: Path) -> None:
    settings = {"slo_class": CLASSES, "slo_key": ["k=chat"]}
    with serve(tokenizer_directory, settings=settings) as server:
        assert server.get("/v1/models").status_code == 401
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
