"""The official client, sync and async, against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.api.helpers import MODEL, SECONDS, Server, serve, text_at, wait_until

PROMPT = "<user>Tell me a story.\n<assistant>"
HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=20, logprobs=True, top_logprobs=2, n=2
    )
    assert answer.choices[0].message.content == text_at(len(PROMPT), 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[1].index == 1
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 20
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == len(PROMPT) + 40


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == text_at(len(PROMPT), 50)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 50
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, stop="red ball") as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content is not None
    assert final.choices[0].message.content.endswith("a dog and a ")


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "cde"], max_tokens=8, logprobs=1, echo=True, extra_body={"top_k": 3}
    )
    assert [choice.text for choice in answer.choices] == ["ab" + text_at(2, 8), "cde" + text_at(3, 8)]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs) == 10
    stream = client.completions.create(model=MODEL, prompt="ab", max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text_at(2, 30)


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).created == 1_700_000_000


async def test_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    ) as client:

        async def streamed(i: int) -> str:
            stream = await client.completions.create(model=MODEL, prompt="x" * i, max_tokens=40, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def whole(i: int) -> str:
            answer = await client.completions.create(model=MODEL, prompt="x" * i, max_tokens=40)
            return answer.choices[0].text

        texts = await asyncio.gather(*(job(i) for i in range(1, 17) for job in (streamed, whole)))
        assert texts == [text_at(i, 40) for i in range(1, 17) for _ in range(2)]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nope", messages=HELLO)


def test_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.code == "invalid_value"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_feature")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 999}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * (2 << 20)}])
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1, stream=True)


def test_authentication(tokenizer_directory: Path) -> None:
    with serve(tokenizer_directory, api_key="right") as server:
        url = f"{server.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as client:
            assert client.models.list().data[0].id == MODEL


def test_rate_limit_and_death(tokenizer_directory: Path) -> None:
    with (
        serve(tokenizer_directory, max_requests=1, step_seconds=0.005) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert full.value.response.headers["retry-after"]
        stream.close()
        wait_until(server.is_idle)
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(stream)
        server.executor.poisoned = True
        with pytest.raises(openai.APIError):
            list(stream)
        with pytest.raises(openai.InternalServerError) as dead:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert dead.value.status_code == 503
