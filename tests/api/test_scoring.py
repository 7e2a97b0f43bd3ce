"""Scores of prompts through POST /v1/completions: echo with logprobs, on a real model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.helpers import SECONDS, Server, serve_model
from tokenloom.kernels.native import extension

PATH = "/v1/completions"
TEXT = "Grüße 🌳 from the old oak, whose leaves are many."


@pytest.fixture(scope="module", params=["reference", "native"])
def real_server(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "native" and extension.missing() is not None:
        pytest.skip(str(extension.missing()))
    with serve_model(tiny_model, num_pages=64, max_chunk_tokens=16, kernels=request.param) as server:
        yield server


def choices(server: Server, prompt: object, **fields: Any) -> list[Any]:
    response = server.post(PATH, {"prompt": prompt, "echo": True, "logprobs": 2, **fields})
    assert response.status_code == 200, response.text
    found: list[Any] = response.json()["choices"]
    return found


def streamed(server: Server, prompt: object, **fields: Any) -> list[Any]:
    """The choices of a stream, put together."""
    events = server.events(PATH, {"prompt": prompt, "echo": True, "logprobs": 2, **fields})
    parts: dict[int, list[Any]] = {}
    for choice in itertools.chain.from_iterable(event["choices"] for event in events):
        parts.setdefault(choice["index"], []).append(choice)
    joined = []
    for index in sorted(parts):
        own = parts[index]
        logprobs: dict[str, list[Any]] = {}
        for part in own:
            for name, values in (part["logprobs"] or {}).items():
                logprobs.setdefault(name, []).extend(values)
        joined.append(
            {
                "index": index,
                "text": "".join(part["text"] for part in own),
                "logprobs": logprobs,
                "finish_reason": own[-1]["finish_reason"],
            }
        )
    return joined


def shown(choice: Any) -> dict[str, Any]:
    return {name: choice[name] for name in ("index", "text", "logprobs", "finish_reason")}


def test_scores_are_those_of_transformers(real_server: Server, tiny_model: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle here")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = real_server.client.tokenizer
    ids = tokenizer.encode(TEXT)
    [choice] = choices(real_server, TEXT, max_tokens=0)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    logprobs = choice["logprobs"]
    assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert {len(values) for values in logprobs.values()} == {len(ids)}
    for position, token in enumerate(ids[1:]):
        row = expected[position]
        assert logprobs["token_logprobs"][position + 1] == pytest.approx(float(row[token]), abs=1e-4)
        top = logprobs["top_logprobs"][position + 1]
        # The token itself is always there, and a text may stand for several tokens.
        assert 1 <= len(top) <= 3
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        assert logprobs["tokens"][position + 1] in top


def test_every_way_to_ask_gives_the_same_scores(real_server: Server) -> None:
    ids = real_server.client.tokenizer.encode(TEXT)
    [alone] = choices(real_server, TEXT, max_tokens=0)
    for prompt in (ids, [TEXT], [ids]):
        assert [shown(choice) for choice in choices(real_server, prompt, max_tokens=0)] == [shown(alone)]
    # A second time its pages are cached, and among others it shares its steps.
    crowd = [TEXT[:9], TEXT, "a", TEXT + TEXT, TEXT]
    for found in (
        choices(real_server, crowd, max_tokens=0),
        streamed(real_server, crowd, max_tokens=0),
    ):
        for index in (1, 4):
            assert shown(found[index]) == {**shown(alone), "index": index}
    for n in (1, 3):
        for found in (
            choices(real_server, TEXT, max_tokens=0, n=n),
            streamed(real_server, TEXT, max_tokens=0, n=n),
        ):
            assert [shown(choice) for choice in found] == [{**shown(alone), "index": i} for i in range(n)]


@pytest.mark.parametrize("n", [1, 2])
def test_scores_before_an_output(real_server: Server, n: int) -> None:
    [alone] = choices(real_server, TEXT, max_tokens=0)
    fields = {"max_tokens": 6, "seed": 5, "n": n, "ignore_eos": True}
    whole = choices(real_server, [TEXT, "other"], **fields)
    assert streamed(real_server, [TEXT, "other"], **fields) == [shown(choice) for choice in whole]
    for choice in whole[:n]:
        assert choice["text"].startswith(TEXT)
        for name, values in alone["logprobs"].items():
            assert choice["logprobs"][name][: len(values)] == values
            assert len(choice["logprobs"][name]) == len(values) + 6
    plain = choices(real_server, TEXT, echo=False, **fields)
    for choice, other in zip(plain, whole[:n], strict=True):
        assert TEXT + choice["text"] == other["text"]
        assert other["logprobs"]["token_logprobs"][-6:] == choice["logprobs"]["token_logprobs"]


def test_a_prompt_of_one_token_has_no_score(real_server: Server) -> None:
    for found in (choices(real_server, "a", max_tokens=0), streamed(real_server, "a", max_tokens=0)):
        assert found[0]["logprobs"]["token_logprobs"] == [None]
        assert found[0]["logprobs"]["top_logprobs"] == [None]
        assert found[0]["text"] == "a"


def test_the_whole_context_may_be_scored(real_server: Server) -> None:
    [choice] = choices(real_server, "x" * 256, max_tokens=0)
    assert len(choice["logprobs"]["tokens"]) == 256
    response = real_server.post(PATH, {"prompt": "x" * 257, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_the_official_client_reads_scores(real_server: Server) -> None:
    with openai.OpenAI(
        base_url=f"{real_server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    ) as client:
        answer = client.completions.create(
            model="tiny", prompt=["abc", "d" * 40], max_tokens=0, echo=True, logprobs=0
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (43, 0)
    for choice, count in zip(answer.choices, (3, 40), strict=True):
        assert choice.logprobs is not None
        scores = choice.logprobs.token_logprobs
        assert scores is not None and len(scores) == count
        assert scores[0] is None and all(score < 0 for score in scores[1:])
        assert choice.logprobs.text_offset == list(range(count))
