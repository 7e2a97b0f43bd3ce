"""Errors: the shape, the names, the numbers, the status."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.api.helpers import MAX_CONTEXT, SECONDS, Server, scripted_client, serve
from tokenloom.api.body import parse_object
from tokenloom.api.errors import ApiError
from tokenloom.config import make_config
from tokenloom.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert isinstance(error, dict)
    return error


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -1, "from 0 to 100"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_k", -2, "from -1 to"),
        ("min_p", 2, "from 0 to 1"),
        ("n", 0, "from 1 to 128"),
        ("n", 33, "at most 32"),
        ("n", 1_000_000, "at most 32"),
        ("presence_penalty", 3, "from -2 to 2"),
        ("frequency_penalty", -2.5, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("seed", 1 << 70, "64-bit"),
        ("max_tokens", -1, "from 0 to"),
        ("min_tokens", -1, "from 0 to"),
        ("stop", [""], "1 to 1024 characters"),
        ("stop", ["x"] * 17, "at most 16"),
        ("logit_bias", {"hello": 1}, "token ids"),
        ("logit_bias", {"3": 101}, "from -100 to 100"),
        ("logit_bias", {"100000": 1}, "token ids from 0 to 257"),
        ("allowed_token_ids", [], "at least one"),
        ("stop_token_ids", [999], "token ids from 0 to 257"),
        ("priority", 1 << 40, "<"),
        ("priority", 1, "0, unless the server runs with --policy priority"),
        ("priority", -1, "0, unless the server runs with --policy priority"),
        ("cache_salt", "", "length"),
        ("exactness", "roughly", "roughly"),
    ],
)
def test_limits_name_field_value_and_limit(server: Server, field: str, value: Any, limit: str) -> None:
    error = error_of(server.post(CHAT, {"messages": HELLO, field: value}), 400)
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert error["message"].startswith(field)
    assert limit in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", "hot", "temperature"),
        ("temperature", True, "temperature"),
        ("n", "2", "n"),
        ("n", 1.5, "n"),
        ("stream", "yes", "stream"),
        ("stop", 5, "stop"),
        ("stop", ["a", 5], "stop[1]"),
        ("stop", {"a": 1}, "stop"),
        ("logit_bias", [1], "logit_bias"),
        ("logit_bias", {"1": "x"}, "logit_bias"),
        ("messages", "hi", "messages"),
        ("messages", [3], "messages[0]"),
        ("messages", [{"content": "x"}], "messages[0].role"),
        ("messages", [{"role": 1, "content": "x"}], "messages[0].role"),
        ("messages", None, "messages"),
        ("stream_options", 1, "stream_options"),
        ("model", 7, "model"),
        ("logprobs", 2, "logprobs"),
        ("chat_template_kwargs", [], "chat_template_kwargs"),
    ],
)
def test_wrong_types(server: Server, field: str, value: Any, param: str) -> None:
    error = error_of(server.post(CHAT, {"messages": HELLO, field: value}), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert error["code"] in ("invalid_type", "missing_required_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("guided_json", {}),
        ("guided_regex", "(a+)+b"),
        ("structured_outputs", {"regex": "a"}),
        ("logits_processors", ["os.system"]),
        ("best_of", 2),
        ("use_beam_search", True),
        ("suffix", "end"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prompt_embeds", "AAAA"),
        ("chat_template", "{{ 1 }}"),
        ("truncate_prompt_tokens", 5),
    ],
)
def test_what_is_not_there_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    error = error_of(server.post(CHAT, {"messages": HELLO, field: value}), 400)
    assert error["param"] == field
    assert error["code"] == "unsupported_feature"
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "content[0].type",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].type"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
    ],
)
def test_messages_with_more_than_text(server: Server, message: dict[str, Any], param: str) -> None:
    error = error_of(server.post(CHAT, {"messages": [message, *HELLO]}), 400)
    assert error["param"] == f"messages[0].{param}"
    assert error["code"] == "unsupported_feature"


def test_harmless_fields_are_ignored(server: Server) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "best_of": 1,
        "use_beam_search": False,
        "parallel_tool_calls": True,
        "something_unheard_of": 1,
    }
    assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1, **harmless}).status_code == 200


def test_misspelt_fields_are_named(server: Server) -> None:
    error = error_of(server.post(CHAT, {"messages": HELLO, "max_token": 1}), 400)
    assert error["param"] == "max_token"
    assert "max_tokens" in error["message"]
    many = {f"field{i}": 1 for i in range(50_000)}
    assert error_of(server.post(CHAT, {"messages": HELLO, **many}), 400)["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"a": "\\ud800x"}',
        b"[" * 100_000,
        b'{"messages":' * 50_000,
        b'{"messages": [' + b'{"role":"user","content":[' * 20_000,
        b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"seed": ' + b"9" * 100_000 + b"}",
        b'{"temperature": 1e999}',
    ],
)
def test_malformed_json(server: Server, content: bytes) -> None:
    assert error_of(server.post(CHAT, content=content), 400)["type"] == "invalid_request_error"


def test_unknown_model(server: Server) -> None:
    error = error_of(server.post(CHAT, {"messages": HELLO, "model": "gpt-9"}), 404)
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"]
    assert error_of(server.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


def test_unknown_path_and_method(server: Server) -> None:
    assert error_of(server.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(server.get("/v1/models/"), 404)
    response = server.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_context_length(server: Server) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "x" * 600}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert str(MAX_CONTEXT) in error["message"]
    assert "600" in error["message"]
    error = error_of(server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    for name in ("max_tokens", "max_completion_tokens"):
        error = error_of(server.post(CHAT, {"messages": HELLO, name: 500}), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == name
        assert "500" in error["message"]
        assert str(MAX_CONTEXT) in error["message"]
    assert error_of(server.post("/v1/completions", {"prompt": "x" * MAX_CONTEXT}), 400)["param"] == "prompt"
    assert server.post("/v1/completions", {"prompt": "x" * (MAX_CONTEXT - 1)}).status_code == 200
    whole = {"prompt": "x" * MAX_CONTEXT, "max_tokens": 0, "echo": True}
    assert server.post("/v1/completions", whole).status_code == 200


def test_what_cannot_fit_is_not_tokenised(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Tokenizer, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        raise AssertionError("tokenised")

    longest = len("</s>")
    limit = 4 * longest * MAX_CONTEXT
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", encode)
        text = "x" * (limit + 1)
        for path, body, param in (
            ("/v1/completions", {"prompt": text}, "prompt"),
            ("/v1/completions", {"prompt": ["ok", text]}, "prompt"),
            (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        ):
            error = error_of(server.post(path, body), 400)
            assert error["code"] == "context_length_exceeded"
            assert error["param"] == param
            assert str(MAX_CONTEXT) in error["message"]
            assert "has at least 51" in error["message"]
    # A special token may take in any number of blanks.
    for text in ("x" * limit, " " * (limit + 1)):
        error = error_of(server.post("/v1/completions", {"prompt": text}), 400)
        assert f"has {len(text)} tokens" in error["message"]


def test_priority_under_its_policy(tokenizer_directory: Path) -> None:
    config = make_config({"policy": "priority"}, env={})
    with Server(scripted_client(tokenizer_directory), config) as server:
        for path, body in ((CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "x"})):
            assert server.post(path, {**body, "max_tokens": 1, "priority": 3}).status_code == 200


def test_priority_of_a_completion_is_refused_too(server: Server) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "x", "priority": 1}), 400)
    assert error["param"] == "priority"


@pytest.mark.parametrize(
    ("prompt", "param"), [([1, 999], "prompt"), ([[1, 999]], "prompt"), ([[1], [999]], "prompt[1]")]
)
def test_tokens_outside_the_vocabulary(server: Server, prompt: object, param: str) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": prompt}), 400)
    assert error["param"] == param
    assert "999" in error["message"]


def test_fields_that_are_not_read_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def decode(value: msgspec.Raw) -> object:
        decoded.append(bytes(value))
        return msgspec.json.decode(value)

    monkeypatch.setattr("tokenloom.api.body._decode_value", decode)
    body = b'{"metadata": [[], []], "n" : 2 , "seed": null, "odd":null, "tools": [ ]}'
    assert parse_object(body, {"n", "seed", "tools"}) == ({"n": 2, "tools": []}, ["metadata"])
    assert decoded == [b"2", b"[ ]"]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("body", "word"), [(b" [1]", "a list"), (b"3", "a"), (b"null", "null"), (b'"x"', "a string")]
)
def test_a_body_that_is_no_object(body: bytes, word: str) -> None:
    with pytest.raises(ApiError, match=f"must be a JSON object, not {word}"):
        parse_object(body, ())


def test_one_prompt_of_many_is_too_long(server: Server) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": ["ok", "x" * 600]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert server.is_idle()


@pytest.mark.parametrize("declared", [True, False])
def test_body_too_large(server: Server, declared: bool) -> None:
    body = json.dumps({"messages": HELLO, "padding": "x" * (3 << 20)}).encode()
    content: bytes | Iterator[bytes] = body
    if not declared:
        content = (body[i : i + 65536] for i in range(0, len(body), 65536))
    error = error_of(server.post(CHAT, content=content), 413)
    assert error["code"] == "request_too_large"
    assert str(1 << 20) in error["message"]


def test_an_endless_body_is_refused_while_it_is_read(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(20):
            connection.sendall(chunk)
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_huge_headers_do_no_harm(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Padding: " + b"x" * 200_000)
        assert connection.recv(64).startswith(b"HTTP/1.1 4")
    assert server.get("/health").status_code == 200


def test_queue_full(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, max_requests=2, max_running=4) as server:
        server.executor.release.clear()
        with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
            try:
                response = http.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
                assert error_of(response, 400)["param"] == "prompt"
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    body = json.dumps({"prompt": ["a", "b"], "max_tokens": 8}).encode()
                    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(
                        body
                    )
                    connection.sendall(head + body)
                    while server.client.num_in_flight < 2:
                        pass
                    response = http.post(CHAT, json={"messages": HELLO})
                    error = error_of(response, 429)
                    assert error["code"] == "queue_full"
                    assert int(response.headers["retry-after"]) >= 1
                    server.executor.release.set()
                    assert connection.recv(64).startswith(b"HTTP/1.1 200")
            finally:
                server.executor.release.set()
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
