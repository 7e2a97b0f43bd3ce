"""POST /v1/chat/completions: answers, streams, prefill, logprobs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.helpers import (
    ENDING_SEED,
    MAX_CONTEXT,
    MODEL,
    Server,
    encode,
    text_at,
)

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Tell me a story."}]
PROMPT = "<user>Tell me a story.\n<assistant>"


def chat(server: Server, **fields: Any) -> Any:
    response = server.post(PATH, {"model": MODEL, "messages": HELLO, "max_tokens": 40, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: Server, **fields: Any) -> list[Any]:
    return server.events(PATH, {"model": MODEL, "messages": HELLO, "max_tokens": 40, **fields})


def contents(events: list[Any], index: int = 0) -> str:
    choices = [c for event in events for c in event["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices)


def test_an_answer(server: Server) -> None:
    answer = chat(server)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert answer["system_fingerprint"] == "tokenloom-numpy-1"
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": text_at(len(PROMPT), 40),
        "refusal": None,
    }
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(PROMPT)
    assert usage["completion_tokens"] == 40
    assert usage["total_tokens"] == len(PROMPT) + 40


def test_usage_counts_cached_tokens(server: Server) -> None:
    message = [{"role": "user", "content": "The same long beginning of a prompt, asked for twice in a row."}]
    chat(server, messages=message)
    again = chat(server, messages=message)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < again["usage"]["prompt_tokens"]


@pytest.mark.parametrize("fields", [{}, {"stop": ["STOP here"]}, {"seed": ENDING_SEED}, {"stop": "ball"}])
def test_a_stream_says_what_the_answer_says(server: Server, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 120, **fields}
    whole = chat(server, **fields)
    events = stream(server, **fields)
    assert contents(events) == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    reasons = [c["finish_reason"] for event in events for c in event["choices"]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]


def test_stop_strings_never_show(server: Server) -> None:
    answer = chat(server, max_tokens=200, stop=["STOP here", "never said"])
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "STOP here"
    assert choice["message"]["content"].endswith("red ball; ")
    kept = chat(server, max_tokens=200, stop="STOP here", include_stop_str_in_output=True)
    assert kept["choices"][0]["message"]["content"].endswith("red ball; STOP here")


def test_an_end_token_is_no_text(server: Server) -> None:
    for fields in ({}, {"skip_special_tokens": False}):
        [choice] = chat(server, seed=ENDING_SEED, max_tokens=100, **fields)["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] is None
        assert "</s>" not in choice["message"]["content"]
    [choice] = chat(server, stop_token_ids=encode("g"), max_tokens=200)["choices"]
    assert choice["stop_reason"] == encode("g")[0]
    assert choice["message"]["content"].endswith("a do")


def test_n_choices_interleave(server: Server) -> None:
    whole = chat(server, n=3)
    events = stream(server, n=3, stream_options={"include_usage": True})
    for index, choice in enumerate(whole["choices"]):
        assert choice["index"] == index
        assert choice["message"]["content"] == contents(events, index)
        assert contents(events, index).strip("\ufffd") in text_at(len(PROMPT), 40, index)
    order = [c["index"] for event in events for c in event["choices"]]
    assert order != sorted(order)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 120
    assert all(event["usage"] is None for event in events[:-1])


def test_continuous_usage(server: Server) -> None:
    events = stream(
        server, max_tokens=5, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert events[-1]["choices"] == []


def test_logprobs(server: Server) -> None:
    [choice] = chat(server, logprobs=True, top_logprobs=2, max_tokens=30)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 30
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] == -1.0
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -2.0]
    [plain] = chat(server, logprobs=True, max_tokens=3)["choices"]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[], [], []]


def test_streamed_logprobs_are_those_of_the_answer(server: Server) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "max_tokens": 60, "stop": "STOP"}
    [choice] = chat(server, **fields)["choices"]
    events = stream(server, **fields)
    streamed = [
        e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]
    ]
    assert streamed == choice["logprobs"]["content"]


def test_prefill_continues_the_last_message(server: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    prompt = "<user>Tell me a story.\n<assistant>Once upon"
    answer = chat(server, messages=messages)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == text_at(len(prompt), 40)
    echoed = chat(server, messages=messages, echo=True)
    assert echoed["choices"][0]["message"]["content"] == "Once upon" + text_at(len(prompt), 40)
    explicit = chat(server, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert explicit["usage"]["prompt_tokens"] == len(prompt)
    answered = chat(server, messages=messages, add_generation_prompt=True)
    assert answered["usage"]["prompt_tokens"] == len(prompt + "\n<assistant>")
    bare = chat(server, messages=HELLO, add_generation_prompt=False)
    assert bare["usage"]["prompt_tokens"] == len("<user>Tell me a story.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ],
)
def test_bad_fields_of_chats(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, {"messages": HELLO, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_content_parts_are_joined(server: Server) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]
    answer = chat(server, messages=[{"role": "user", "content": parts}], return_token_ids=True)
    assert answer["prompt_token_ids"] == encode("<user>Tell me\na story.\n<assistant>")
    assert len(answer["choices"][0]["token_ids"]) == 40


def test_developer_is_system_and_null_is_default(server: Server) -> None:
    messages = [{"role": "developer", "content": "Be kind."}, *HELLO]
    answer = chat(server, messages=messages, temperature=None, n=None, stop=None, tools=None, stream=None)
    assert answer["usage"]["prompt_tokens"] == len("<system>Be kind.\n" + PROMPT)


def test_without_max_tokens_the_context_is_the_limit(server: Server) -> None:
    answer = chat(server, max_tokens=None)
    assert answer["usage"]["total_tokens"] == MAX_CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


def test_prompt_logprobs(server: Server) -> None:
    answer = chat(server, prompt_logprobs=1, max_tokens=0)
    entries = answer["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(PROMPT)
    for token, entry in zip(encode(PROMPT)[1:], entries[1:], strict=True):
        assert str(token) in entry
    assert answer["choices"][0]["message"]["content"] == ""
