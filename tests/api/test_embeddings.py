"""POST /v1/embeddings: forms of inputs and answers, the official client, errors, company."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.api.helpers import (
    MAX_CONTEXT,
    MODEL,
    POISON,
    SECONDS,
    Server,
    encode,
    serve,
    serve_model,
    wait_until,
)
from tokenloom import LLM
from tokenloom.serving.requests import EMBEDDING_PARAMS

PATH = "/v1/embeddings"


def embed(server: Server, given: object, **fields: Any) -> Any:
    response = server.post(PATH, {"input": given, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def vectors(server: Server, given: object, **fields: Any) -> list[list[float]]:
    answer = embed(server, given, **fields)
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return [item["embedding"] for item in answer["data"]]


# --- forms -----------------------------------------------------------------------------------------------


def test_the_answer_has_the_shape_of_openai(server: Server) -> None:
    answer = embed(server, ["one", "three"], model=MODEL, user="someone", encoding_format="float")
    assert answer["object"] == "list"
    assert answer["model"] == MODEL
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (8, 8)
    assert "completion_tokens" not in usage


def test_forms_of_an_input(server: Server) -> None:
    expected = vectors(server, "Once upon")
    for given in (["Once upon"], encode("Once upon"), [encode("Once upon")]):
        assert vectors(server, given) == expected
    both = vectors(server, ["Once upon", "a time"])
    assert both == expected + vectors(server, "a time")
    assert vectors(server, [encode("Once upon"), encode("a time")]) == both


def test_base64_is_little_endian_float32(server: Server) -> None:
    for fields in ({}, {"pooling": "mean"}, {"normalize": False}):
        floats = vectors(server, ["abc", "de"], **fields)
        for data, values in zip(
            vectors(server, ["abc", "de"], encoding_format="base64", **fields), floats, strict=True
        ):
            assert isinstance(data, str)
            assert np.frombuffer(base64.b64decode(data), "<f4").tolist() == values


def test_null_fields_stand_for_their_defaults(server: Server) -> None:
    names = (
        "dimensions",
        "encoding_format",
        "pooling",
        "normalize",
        "user",
        "truncate_prompt_tokens",
        "model",
    )
    assert vectors(server, "abc", **dict.fromkeys(names)) == vectors(server, "abc")


def test_pooling_and_length(server: Server) -> None:
    text = "abcdefgh"
    raw = {name: vectors(server, text, pooling=name, normalize=False)[0] for name in ("mean", "last")}
    rows = [
        vectors(server, encode(text)[: i + 1], pooling="last", normalize=False)[0] for i in range(len(text))
    ]
    # The simulated rows depend on their token and position only.
    assert raw["last"] == rows[-1]
    np.testing.assert_allclose(raw["mean"], np.mean(rows, axis=0), rtol=1e-6)
    for name, vector in raw.items():
        unit = vectors(server, text, pooling=name)[0]
        assert math.isclose(math.fsum(x * x for x in unit), 1, rel_tol=1e-6)
        np.testing.assert_allclose(unit, np.array(vector) / np.linalg.norm(vector), rtol=1e-6)
    assert vectors(server, text) == vectors(server, text, pooling="last")


def test_the_server_has_a_default_pooling(tiny_model: Path) -> None:
    with serve_model(tiny_model, num_pages=32, pooling_type="mean") as server:
        assert vectors(server, "abc") == vectors(server, "abc", pooling="mean")
        assert vectors(server, "abc") != vectors(server, "abc", pooling="last")
        config = server.get("/v1/models").json()["data"]
        assert [model["object"] for model in config] == ["model"]


@pytest.mark.parametrize("allowed", [(4, 6), ()])
def test_vectors_of_a_matryoshka_model_may_be_cut(
    tokenizer_directory: Path, allowed: tuple[int, ...]
) -> None:
    with serve(tokenizer_directory, hidden_size=8, matryoshka=allowed) as server:
        [raw] = vectors(server, "abc", normalize=False)
        assert len(raw) == 8
        assert vectors(server, "abc", normalize=False, dimensions=6) == [raw[:6]]
        [unit] = vectors(server, "abc", dimensions=4)
        np.testing.assert_allclose(unit, np.array(raw[:4]) / np.linalg.norm(raw[:4]), rtol=1e-6)
        for wrong in (0, -1, 9, 1 << 70, *((5, 8) if allowed else ())):
            error = server.post(PATH, {"input": "abc", "dimensions": wrong}).json()["error"]
            assert (error["param"], error["code"]) == ("dimensions", "invalid_value")
            assert ("4, 6" if allowed else "1 to 8") in error["message"]


def test_truncation(server: Server) -> None:
    long = "x" * (MAX_CONTEXT + 50)
    answer = embed(server, [long, "ab"], truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == MAX_CONTEXT + 2
    assert vectors(server, long, truncate_prompt_tokens=3) == vectors(server, "xxx")
    assert vectors(server, [encode("abcd")], truncate_prompt_tokens=2) == vectors(server, "ab")
    # A completion is never cut.
    response = server.post("/v1/completions", {"prompt": "ab", "truncate_prompt_tokens": 1})
    assert response.json()["error"]["code"] == "unsupported_feature"


def test_many_inputs_keep_their_order(server: Server) -> None:
    """More than run at once, more than may wait."""
    count = 300
    assert count > server.client.card.max_requests
    texts = [f"{i} {'x' * (i % 50)}" for i in range(count)]
    found = vectors(server, texts, pooling="mean")
    assert len({tuple(vector) for vector in found}) == count
    for i in (0, 1, 57, 299):
        assert found[i] == vectors(server, texts[i], pooling="mean")[0]
    wait_until(server.is_idle)


def test_a_cached_prefix_shows_in_the_usage(server: Server) -> None:
    text = "A text of more than one page, which is asked for twice."
    cached = [
        embed(server, text, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for fields in ({}, {}, {"pooling": "mean"}, {"cache_salt": "other"})
    ]
    assert cached == [0, len(text) // 16 * 16, 0, 0]


# --- the official client ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server(tiny_model: Path) -> Iterator[Server]:
    with serve_model(tiny_model, num_pages=48, max_running=12, max_batch_tokens=64) as server:
        yield server


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), num_pages=128) as made:
        yield made


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_official_client(real_server: Server, llm: LLM, pooling: Any) -> None:
    texts = ["", "a", "two words", "x" * 200]
    expected = [output.outputs.embedding for output in llm.embed(texts[1:], pooling=pooling)]
    with openai.OpenAI(
        base_url=f"{real_server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    ) as client:
        # Without a format the client asks for base64 and reads it.
        for options in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(
                model="tiny",
                input=texts[1:],
                extra_body={"pooling": pooling},
                **options,  # type: ignore[arg-type]
            )
            assert [item.embedding for item in answer.data] == expected
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
        coded = client.embeddings.create(
            model="tiny", input=[1, 2], encoding_format="base64", extra_body={"pooling": pooling}
        )
        assert isinstance(coded.data[0].embedding, str)
        with pytest.raises(openai.BadRequestError) as empty:
            client.embeddings.create(model="tiny", input=texts)
        assert empty.value.param == "input[0]"
        with pytest.raises(openai.BadRequestError) as shorter:
            client.embeddings.create(model="tiny", input="a", dimensions=8)
        assert (shorter.value.param, shorter.value.code) == ("dimensions", "unsupported_feature")


def test_chats_and_embeddings_share_the_engine(real_server: Server, llm: LLM) -> None:
    """Chats get what they get without company, and so do the embeddings."""
    chats = [
        {"messages": [{"role": "user", "content": f"{'na ' * (i * 5)}{i}"}], "seed": i, "max_tokens": 30,
         "logprobs": True, "top_logprobs": 1, "ignore_eos": True}
        for i in range(8)
    ]  # fmt: skip
    texts = [f"{'lorem ipsum ' * (i % 15)}{i}" for i in range(60)]
    expected = {
        pooling: [output.outputs.embedding for output in llm.embed(texts, pooling=pooling)]  # type: ignore[arg-type]
        for pooling in ("mean", "last")
    }

    def chat(body: Any) -> Any:
        response = real_server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    alone = [chat(body) for body in chats]
    before = real_server.engine.scheduler.num_steps
    with ThreadPoolExecutor(10) as pool:
        means = pool.submit(vectors, real_server, texts, pooling="mean")
        lasts = pool.submit(vectors, real_server, texts, pooling="last")
        together = list(pool.map(chat, chats))
        assert together == alone
        assert means.result() == expected["mean"]
        assert lasts.result() == expected["last"]
    assert real_server.engine.scheduler.num_steps > before
    wait_until(real_server.is_idle)


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["ok", ""]}, "input[1]"),
        ({"input": 3}, "input"),
        ({"input": {"text": "x"}}, "input"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": [1, True]}, "input[1]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [[1], [2, "x"]]}, "input[1][1]"),
        ({"input": [1, 100_000]}, "input"),
        ({"input": [[1], [-1]]}, "input[1]"),
        ({"input": [1 << 80]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "pooling": True}, "pooling"),
        ({"input": "x", "pooling_type": "mean"}, "pooling_type"),
        ({"input": "x", "poolin": "mean"}, "poolin"),
        ({"input": "x", "normalize": 1}, "normalize"),
        ({"input": "x", "dimensions": 4}, "dimensions"),
        ({"input": "x", "dimensions": "4"}, "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": MAX_CONTEXT + 1}, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "x", "truncation_side": "left"}, "truncation_side"),
        ({"input": "x", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "x", "endianness": "big"}, "endianness"),
        ({"input": "x", "tools": [{}]}, "tools"),
        ({"input": "x", "priority": 1}, "priority"),
        ({"input": "x", "cache_salt": ""}, "cache_salt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "input"),
    ],
)
def test_bad_fields(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, content=json.dumps(fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert server.is_idle()


def test_2048_inputs_are_taken(server: Server) -> None:
    assert len(vectors(server, ["x"] * 2048)) == 2048


def test_an_input_that_is_too_long_is_named(server: Server) -> None:
    assert len(vectors(server, "x" * MAX_CONTEXT)) == 1
    for given, name in (
        ("x" * (MAX_CONTEXT + 1), "input has 513"),
        (["a", "x" * (MAX_CONTEXT + 1)], "input[1] has 513"),
        (["a", "b", [1] * (MAX_CONTEXT + 1)][2:], "input has 513"),
        ([[1], [1] * (MAX_CONTEXT + 1)], "input[1] has 513"),
        (["a", "x" * 100_000], "input[1] has at least"),
    ):
        error = server.post(PATH, {"input": given}).json()["error"]
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
        assert name in error["message"]
        assert str(MAX_CONTEXT) in error["message"]


def test_other_refusals(server: Server, tokenizer_directory: Path) -> None:
    response = server.post(PATH, {"input": "x", "model": "nope"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert server.get(PATH).status_code == 405
    assert server.post(PATH, content=b"{").status_code == 400
    with serve(tokenizer_directory, api_key="right") as locked:
        assert locked.post(PATH, {"input": "x"}).status_code == 401
        headers = {"Authorization": "Bearer right"}
        assert locked.post(PATH, {"input": "x"}, headers=headers).status_code == 200


def test_an_engine_that_fails_ends_the_request(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory) as server:
        assert server.post(PATH, {"input": [[1], [POISON], [2]]}).status_code == 503


def test_a_hidden_state_that_is_not_finite_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tokenloom.engine.sequence.mean_bytes", lambda total, count: np.array([np.nan], "<f4").tobytes()
    )
    response = server.post(PATH, {"input": ["x", "y"]})
    assert response.status_code == 500
    assert "input 0: " in response.json()["error"]["message"]
    assert "not finite" in response.json()["error"]["message"]
    wait_until(server.is_idle)


def test_a_full_queue(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, max_running=2, max_waiting=1) as server:
        server.executor.release.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(vectors, server, ["a"] * 9)
            wait_until(lambda: server.client.num_in_flight == 2)
            assert server.post(PATH, {"input": ["b", "c"]}).status_code == 429
            server.executor.release.set()
            assert len(first.result()) == 9


def test_leaving_cancels(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, step_seconds=0.005) as server:
        content = json.dumps({"input": ["x" * 400] * 500}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            connection.sendall(head + content)
            wait_until(lambda: bool(server.engine.scheduler.cache.references))
        wait_until(server.is_idle, 2.0)
        assert server.engine.scheduler.num_steps < 400
        metrics = server.get("/metrics").text
        assert 'request_success_total{finished_reason="abort"' in metrics


def test_metrics(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory) as server:
        embed(server, ["abc", "de"])
        lines = server.get("/metrics").text.splitlines()
        values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        label = f'model_name="{MODEL}"'
        assert values[f"tokenloom_prompt_tokens_total{{{label}}}"] == 5
        assert values[f"tokenloom_generation_tokens_total{{{label}}}"] == 0
        assert values[f'tokenloom_request_success_total{{finished_reason="stop",{label}}}'] == 2
        assert values[f"tokenloom_e2e_request_latency_seconds_count{{{label}}}"] == 1
        assert values[f"tokenloom_request_queue_time_seconds_count{{{label}}}"] == 2
        assert values[f"tokenloom_time_to_first_token_seconds_count{{{label}}}"] == 0


def test_the_description_has_the_endpoint(server: Server) -> None:
    document = server.get("/openapi.json").json()
    operation = document["paths"][PATH]["post"]
    assert operation["summary"]
    fields = document["components"]["schemas"]["EmbeddingRequest"]
    assert fields["required"] == ["input"]
    assert fields["properties"]["encoding_format"]["enum"] == ["base64", "float"]
    assert PATH in server.get("/docs").text


async def test_async_clients_in_a_crowd(real_server: Server, llm: LLM) -> None:
    texts = [f"{i} {'y' * i}" for i in range(30)]
    expected = [output.outputs.embedding for output in llm.embed(texts)]
    async with openai.AsyncOpenAI(
        base_url=f"{real_server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    ) as client:
        answers = await asyncio.gather(
            *(client.embeddings.create(model="tiny", input=text) for text in texts)
        )
    assert [answer.data[0].embedding for answer in answers] == expected


def test_embeddings_draw_nothing() -> None:
    assert (EMBEDDING_PARAMS.max_tokens, EMBEDDING_PARAMS.seed) == (0, 0)
