"""POST /v1/completions: forms of prompts, echo, logprobs, several prompts in one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.helpers import MAX_CONTEXT, MODEL, Server, encode, serve, text_at
from tokenloom.api.params import chat_params, completion_params
from tokenloom.api.schemas import ChatCompletionRequest, CompletionRequest
from tokenloom.serving.client import ModelCard

PATH = "/v1/completions"


def complete(server: Server, prompt: object, **fields: Any) -> Any:
    response = server.post(PATH, {"model": MODEL, "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_forms_of_a_prompt(server: Server) -> None:
    text = "Once upon a time"
    expected = text_at(len(text), 16)
    for prompt in (text, [text], encode(text), [encode(text)]):
        answer = complete(server, prompt)
        assert answer["object"] == "text_completion"
        assert answer["id"].startswith("cmpl-")
        assert [choice["text"] for choice in answer["choices"]] == [expected]
        assert answer["usage"]["completion_tokens"] == 16


def test_many_prompts_with_n_choices(server: Server) -> None:
    prompts = ["a", "bcd", "efghi"]
    answer = complete(server, prompts, n=2, max_tokens=6)
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        assert choice["text"] == text_at(len(prompts[index // 2]), 6, index % 2)
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["usage"]["completion_tokens"] == 36


def test_many_prompts_stream_interleaved(server: Server) -> None:
    fields: dict[str, Any] = {"n": 2, "max_tokens": 60, "stop": ["ball"], "logprobs": 1}
    prompts = ["a", encode("bcd")]
    whole = complete(server, ["a", "bcd"], **fields)
    assert server.post(PATH, {"prompt": prompts}).status_code == 400
    events = server.events(PATH, {"prompt": ["a", "bcd"], **fields})
    for choice in whole["choices"]:
        parts = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [v for part in parts if part["logprobs"] for v in part["logprobs"][name]] == values
    order = [c["index"] for event in events for c in event["choices"]]
    assert order != sorted(order)


def test_echo(server: Server) -> None:
    text = "Grüße 🌳"
    assert complete(server, text, echo=True, max_tokens=0)["choices"][0]["text"] == text
    assert complete(server, encode(text), echo=True, max_tokens=0)["choices"][0]["text"] == text
    answer = complete(server, text, echo=True, max_tokens=5, n=2)
    assert [c["text"] for c in answer["choices"]] == [
        text + text_at(len(encode(text)), 5, i) for i in range(2)
    ]
    events = server.events(PATH, {"prompt": text, "echo": True, "max_tokens": 5})
    assert "".join(c["text"] for event in events for c in event["choices"]) == text + text_at(
        len(encode(text)), 5
    )


@pytest.mark.parametrize("max_tokens", [0, 12])
def test_echo_with_logprobs(server: Server, max_tokens: int) -> None:
    text = "Grüße 🌳 now"
    ids = encode(text)
    [choice] = complete(server, text, echo=True, logprobs=2, max_tokens=max_tokens)["choices"]
    logprobs = choice["logprobs"]
    count = len(ids) + max_tokens
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(logprobs, count)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if token != "\ufffd":
            assert choice["text"].startswith(token, offset)
    # The tree is four tokens, and one character.
    assert offsets.count(text.index("🌳")) == 4
    if max_tokens == 0:
        assert choice["text"] == text
        assert choice["finish_reason"] == "length"


def test_logprobs_include_the_chosen_token(server: Server) -> None:
    [choice] = complete(server, "abc", logprobs=0, max_tokens=4)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{t: -1.0} for t in choice["logprobs"]["tokens"]]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_return_token_ids(server: Server) -> None:
    answer = complete(server, ["ab", "c"], return_token_ids=True, max_tokens=3)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [encode("ab"), encode("c")]
    events = server.events(PATH, {"prompt": "ab", "return_token_ids": True, "max_tokens": 3})
    assert events[0]["choices"][0]["prompt_token_ids"] == encode("ab")
    ids = [token for event in events for c in event["choices"] for token in c["token_ids"]]
    assert ids == answer["choices"][0]["token_ids"]


def test_prompt_logprobs_by_choice(server: Server) -> None:
    [choice] = complete(server, "abc", prompt_logprobs=0, max_tokens=1)["choices"]
    assert [entry and list(entry) for entry in choice["prompt_logprobs"]] == [
        None,
        [str(encode("b")[0])],
        [str(encode("c")[0])],
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["ok", ""]}, "prompt[1]"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[1], [2, "x"]]}, "prompt[1][1]"),
        ({"prompt": [1, 100_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 80]}, "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt"),
        ({"prompt": ["x"] * 97}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": -1, "echo": True}, "logprobs"),
        ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "bad_words": [" "]}, "bad_words"),
    ],
)
def test_bad_fields_of_completions(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 400


def test_totals_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenloom.api.prompts.MAX_TOTAL_TOKENS", 100)
    error = server.post(PATH, {"prompt": ["x" * 40] * 3}).json()["error"]
    assert error["param"] == "prompt"
    assert "120 tokens" in error["message"]
    assert "100" in error["message"]
    monkeypatch.setattr("tokenloom.api.completions.MAX_CHOICES", 8)
    error = server.post(PATH, {"prompt": ["x"] * 3, "n": 3}).json()["error"]
    assert error["param"] == "n"
    assert "at most 2 for 3 prompts" in error["message"]


def test_a_salt_parts_the_prefix_cache(server: Server) -> None:
    prompt = "A prompt of more than one page, which two tenants happen to share."
    cached = [
        complete(server, prompt, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("one", "two", "one")
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_defaults_of_the_model() -> None:
    card = ModelCard(
        name="m",
        created=1,
        max_context=64,
        vocab_size=256,
        max_running=8,
        max_requests=8,
        default_sampling={
            "temperature": 0.25,
            "top_k": 7,
            "min_p": 0.5,
            "repetition_penalty": 1.5,
            "max_tokens": 9,
        },
    )
    params = completion_params(CompletionRequest(prompt="x"), card)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.25, 1.0, 7, 16)
    assert (params.min_p, params.repetition_penalty) == (0.5, 1.5)
    params = completion_params(CompletionRequest(prompt="x", min_p=0, repetition_penalty=1), card)
    assert (params.min_p, params.repetition_penalty) == (0, 1)
    assert chat_params(ChatCompletionRequest(messages=[]), card).max_tokens == 9
    assert chat_params(ChatCompletionRequest(messages=[], max_tokens=3), card).max_tokens == 3
    params = completion_params(CompletionRequest(prompt="x", temperature=0, top_k=0, max_tokens=3), card)
    assert (params.temperature, params.top_k, params.max_tokens) == (0, 0, 3)


def test_a_long_default_of_the_model_ends_where_the_context_does(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, default_sampling={"max_tokens": 100_000}) as server:
        body = {"messages": [{"role": "user", "content": "x" * 450}]}
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert response.json()["usage"]["total_tokens"] == MAX_CONTEXT
