"""Models, tokenize, docs, metrics, log lines."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import tokenloom
from tests.api.helpers import MAX_CONTEXT, MODEL, Server, encode, scripted_client, serve, wait_until
from tokenloom.api.app import create_app
from tokenloom.api.endpoints import ENDPOINTS
from tokenloom.api.metrics import Metrics
from tokenloom.config import Config
from tokenloom.engine.plan import StepRecord
from tokenloom.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hi"}]


def test_models(server: Server) -> None:
    [model] = server.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert model["max_model_len"] == MAX_CONTEXT
    assert server.get(f"/v1/models/{MODEL}").json() == model


def test_version(server: Server) -> None:
    assert server.get("/version").json() == {"version": tokenloom.__version__, "numerics": "numpy-1"}


def test_tokenize_and_back(server: Server) -> None:
    text = "Grüße 🌳"
    answer = server.post("/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == encode(text)
    assert answer["count"] == len(encode(text))
    assert answer["max_model_len"] == MAX_CONTEXT
    assert answer["token_strs"][:2] == ["G", "r"]
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": HELLO}).json()
    assert chat["tokens"] == encode("<user>hi\n<assistant>")
    assert chat["token_strs"] is None
    long = server.post("/tokenize", {"prompt": "x" * 100_000}).json()
    assert long["count"] == 100_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_bad_fields_of_tokenize(server: Server, path: str, body: Any, param: str) -> None:
    response = server.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_openapi(server: Server) -> None:
    spec = server.get("/openapi.json").json()
    assert spec["openapi"].startswith("3.")
    for endpoint in ENDPOINTS:
        assert endpoint.method.lower() in spec["paths"][endpoint.path.replace(":path", "")]
    schemas = spec["components"]["schemas"]
    names = re.findall(r'"#/components/schemas/(\w+)"', server.get("/openapi.json").text)
    assert set(names) <= set(schemas)
    fields = schemas["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "top_k", "min_p", "ignore_eos", "stream_options"} <= set(fields)


def test_docs_need_nothing_from_elsewhere(server: Server) -> None:
    response = server.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "<script" not in response.text
    for endpoint in ENDPOINTS:
        assert endpoint.path.replace(":path", "") in response.text


def samples(text: str) -> dict[str, float]:
    """Value by sample name and labels other than the model's."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == MODEL
            values[sample.name + "".join(f"|{v}" for v in labels.values())] = sample.value
    return values


def test_metrics(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory) as server:
        for stream in (False, True):
            body = {"messages": HELLO, "max_tokens": 30, "n": 2, "stream": stream}
            assert server.post("/v1/chat/completions", body).status_code == 200
        wait_until(server.is_idle)
        wait_until(
            lambda: samples(server.get("/metrics").text).get("tokenloom_iteration_tokens_total_sum", 0) > 100
        )
        values = samples(server.get("/metrics").text)
    name = "tokenloom_"
    assert values[name + "time_to_first_token_seconds_count"] == 2
    assert values[name + "inter_token_latency_seconds_count"] == 4 * 29
    assert values[name + "request_time_per_output_token_seconds_count"] == 4
    assert values[name + "e2e_request_latency_seconds_count"] == 2
    assert values[name + "request_queue_time_seconds_count"] == 2
    assert values[name + "request_prefill_time_seconds_count"] == 2
    assert values[name + "request_decode_time_seconds_count"] == 4
    assert values[name + "generation_tokens_total"] == 120
    assert values[name + "prompt_tokens_total"] == 2 * len("<user>hi\n<assistant>")
    assert values[name + "prompt_tokens_cached_total"] == values[name + "prefix_cache_hits_total"] == 16
    assert values[name + "prefix_cache_queries_total"] == values[name + "prompt_tokens_total"]
    assert values[name + "request_success_total|length"] == 4
    assert values[name + "request_success_total|abort"] == 0
    assert values[name + "num_requests_running"] == 0
    assert values[name + "num_requests_waiting"] == 0
    assert values[name + "kv_cache_usage_perc"] == 0
    assert values[name + "num_preemptions_total"] == 0
    assert values[name + "engine_restarts_total"] == 0
    for stage in ("plan", "build", "execute", "commit"):
        assert values[f"{name}scheduler_stage_seconds_total|{stage}"] > 0


def test_a_restarted_engine_is_counted(tokenizer_directory: Path) -> None:
    client = scripted_client(tokenizer_directory)
    metrics = Metrics()
    for step in (7, 8, 9, 1, 2, 3):
        record = StepRecord(
            step=step,
            time=0.0,
            prefill_rows=1,
            decode_rows=1,
            context_tokens=2,
            num_running=1,
            num_waiting=0,
            pages_used=1,
            pages_idle=0,
            pages_total=4,
            num_preemptions=1,
            num_finished=0,
            prefix_queries=2,
            prefix_hits=1,
            seconds={"plan": 0.5},
        )
        metrics.on_step(client, record)
    assert samples(metrics.render(client).decode())["tokenloom_engine_restarts_total"] == 0
    client.num_restarts = 2
    metrics.render(client)
    values = samples(metrics.render(client).decode())
    assert values["tokenloom_engine_restarts_total"] == 2
    assert values["tokenloom_num_preemptions_total"] == 6
    assert values["tokenloom_scheduler_stage_seconds_total|plan"] == 3


def test_tokenize_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenloom.api.tokenize.MAX_TOTAL_TOKENS", 100)
    assert server.post("/tokenize", {"prompt": "x" * 100}).status_code == 200
    for body, param in (
        ({"prompt": "x" * 101}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages"),
    ):
        response = server.post("/tokenize", body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


def test_texts_of_many_tokens_are_made_off_the_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    token_text = Tokenizer.token_text

    def noted(tokenizer: Tokenizer, token_id: int) -> str:
        threads.add(threading.current_thread().name)
        return token_text(tokenizer, token_id)

    monkeypatch.setattr(Tokenizer, "token_text", noted)
    answer = server.post("/tokenize", {"prompt": "x" * 20_000, "return_token_strs": True}).json()
    assert answer["token_strs"] == ["x"] * 20_000
    assert all(name.startswith("asyncio") for name in threads), threads


async def test_one_log_line_per_request(tokenizer_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = scripted_client(tokenizer_directory)
    await client.start()
    transport = httpx.ASGITransport(create_app(client, Config()))
    with caplog.at_level(logging.INFO, "tokenloom.requests"):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"prompt": ["abc", "de"], "max_tokens": 4}
            answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    await client.close()
    [line] = [record.getMessage() for record in caplog.records if record.name == "tokenloom.requests"]
    for part in (answer.json()["id"], "mine", MODEL, "tokens_in=5", "tokens_out=8", "finish=length"):
        assert part in line
