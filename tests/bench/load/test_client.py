"""The client against a server that does what a script says."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from itertools import product
from typing import Any

import pytest

from tests.bench.load.fake_server import (
    DONE,
    FakeServer,
    Step,
    event,
    serving,
    text,
    total,
    usage,
    words,
)
from tokenloom.bench.load.client import Client, StreamState, Target
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.runner import Clock
from tokenloom.bench.load.sse import EventReader


def target(server: FakeServer, *, chat: bool = False, **more: Any) -> Target:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Target(url=server.url + path, chat=chat, **more)


async def ask(server: FakeServer, *, chat: bool = False, **more: Any) -> Record:
    """One request to the fake server, which is started for it."""
    async with serving(server):
        to = target(server, chat=chat, **more)
        async with Client(to, Clock()) as client:
            record = Record(number=0, wanted_input=3, wanted_output=4)
            await client.send(to.encode("x" if chat else [1, 2, 3], 4), record)
    return record


def scripted(*steps: Step, **more: Any) -> FakeServer:
    return FakeServer(lambda body: list(steps), **more)


async def test_times_are_those_of_the_script() -> None:
    server = scripted(0.10, text("a"), 0.05, text("b"), 0.15, text("c", "length"), total(3, 3), DONE)
    record = await ask(server)
    assert record.ok, (record.error, record.detail)
    assert record.first - record.sent == pytest.approx(0.10, abs=0.04)
    assert list(record.gaps) == pytest.approx([0.05, 0.15], abs=0.04)
    assert record.last - record.first == pytest.approx(sum(record.gaps))
    assert (record.input_tokens, record.output_tokens) == (3, 3)
    assert record.ended >= record.last


async def test_the_request_is_what_was_asked_for() -> None:
    server = scripted(text("a", "length"), DONE)
    record = await ask(server, body={"model": "m", "temperature": 0.5}, headers={"X-Test": "yes"})
    assert record.ok
    assert server.bodies[0] == {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "model": "m",
        "temperature": 0.5,
    }
    assert server.headers[0]["X-Test"] == "yes"
    assert "Accept-Encoding" not in server.headers[0]
    await ask(server, chat=True, continuous_usage=False)
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "x"}]
    assert server.bodies[1]["max_completion_tokens"] == 4
    assert server.bodies[1]["stream_options"] == {"include_usage": True}


async def test_several_tokens_in_a_chunk_are_counted_by_usage() -> None:
    server = scripted(
        text("", usage=usage(3, 0)),
        0.03,
        text("a b c", usage=usage(3, 3)),
        0.03,
        text("", usage=usage(3, 4)),  # half of a character: a token all the same
        0.03,
        text("", "length", usage=usage(3, 4)),
        DONE,
    )
    record = await ask(server)
    assert record.ok
    assert record.output_tokens == 4
    assert len(record.gaps) == 1
    assert record.first - record.sent >= 0.03
    assert record.tpot == pytest.approx((record.last - record.first) / 3)


async def test_without_usage_chunks_are_tokens() -> None:
    record = await ask(scripted(text("a"), text(""), text("b"), text("", "stop"), DONE))
    assert (record.output_tokens, record.input_tokens, len(record.gaps)) == (3, -1, 2)


async def test_a_sum_with_the_last_chunk_is_not_a_token() -> None:
    record = await ask(scripted(text("a"), 0.05, text("", "stop", usage=usage(3, 7)), DONE))
    assert (record.output_tokens, len(record.gaps)) == (7, 0)
    assert record.last == record.first


async def test_one_token_without_a_text() -> None:
    record = await ask(scripted(text("", "length", usage=usage(3, 1)), DONE))
    assert record.ok
    assert record.output_tokens == 1
    assert record.first == record.last > 0


async def test_a_chat_begins_with_its_first_content() -> None:
    server = scripted(
        event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
        0.05,
        event(choices=[{"index": 0, "delta": {"reasoning_content": "hm"}}]),
        words("a"),
        words(None, "stop"),
        total(9, 2),
        DONE,
    )
    record = await ask(server, chat=True)
    assert record.ok
    assert record.first - record.sent >= 0.05
    assert len(record.gaps) == 1


STREAM = (
    b": a comment\n\nevent: x\ndata: "
    + json.dumps({"choices": [{"text": "ä€𝄞\u2028"}]}, ensure_ascii=False).encode()
    + b"\n\ndata:{}\ndata:{}\n\n"
    + DONE
)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_come_out_whole_however_the_bytes_are_cut(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    expected = EventReader().feed(stream)
    assert len(expected) == 3
    assert json.loads(expected[0]) == {"choices": [{"text": "ä€𝄞\u2028"}]}
    assert expected[1:] == [b"{}\n{}", b"[DONE]"]
    for a, b in product(range(len(stream) + 1), repeat=2):
        reader = EventReader()
        parts = [stream[: min(a, b)], stream[min(a, b) : max(a, b)], stream[max(a, b) :]]
        assert [item for part in parts for item in reader.feed(part)] == expected
    reader = EventReader()
    assert [e for i in range(len(stream)) for e in reader.feed(stream[i : i + 1])] == expected


async def test_split_bytes_on_the_wire() -> None:
    whole = text("ä€", usage=usage(3, 1)) + text("𝄞", "length", usage=usage(3, 2)) + DONE
    steps: list[Step] = []
    for start in range(0, len(whole), 7):
        steps += [whole[start : start + 7], 0.001]
    record = await ask(FakeServer(lambda body: steps))
    assert record.ok
    assert (record.output_tokens, len(record.gaps)) == (2, 1)


ERRORS: list[tuple[str, FakeServer, str, str]] = [
    ("400", scripted(status=400), "HTTP 400", "no"),
    ("429", scripted(status=429), "HTTP 429", "no"),
    ("503", scripted(status=503, error="<html>"), "HTTP 503", "<html>"),
    ("terminal", scripted(status=500, error="a\x1b[2Jb\nc"), "HTTP 500", "a [2Jb c"),
    ("json", scripted(b"{}", content_type="application/json"), "no event stream", "application/json"),
    ("cut", scripted(text("a"), 0.02, "break"), "stream broke off", ""),
    ("cut before", scripted(0.02, "break"), "", ""),
    ("early", scripted(text("a")), "stream ended early", ""),
    ("empty", scripted(DONE), "no token", ""),
    ("nothing", scripted(), "stream ended early", ""),
    ("garbage", scripted(b"data: {oops\n\n"), "malformed chunk", ""),
    ("type", scripted(b'data: {"choices": 5}\n\n'), "malformed chunk", ""),
    (
        "event",
        scripted(text("a"), event(error={"message": "lost it"}), DONE),
        "error in the stream",
        "lost it",
    ),
]


@pytest.mark.parametrize(("server", "name", "detail"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
async def test_errors_are_named_and_not_raised(server: FakeServer, name: str, detail: str) -> None:
    record = await ask(server)
    assert not record.ok
    assert record.error
    if name:
        assert record.error == name
    assert detail in record.detail
    assert record.ended >= record.sent >= 0


async def test_an_answer_that_takes_too_long() -> None:
    start = time.perf_counter()
    record = await ask(scripted(text("a"), 5.0, text("b", "stop")), timeout=0.2)
    assert record.error == "no end within 0.2 s"
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("url", "name"),
    [("http://127.0.0.1:{port}/v1", "connection refused"), ("http://nowhere.invalid/v1", "cannot connect")],
)
async def test_no_server(url: str, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    to = Target(url=url.format(port=port), chat=False)
    record = Record(number=0, wanted_input=1, wanted_output=1)
    async with Client(to, Clock()) as client:
        await client.send(to.encode([1], 1), record)
    assert record.error == name


async def test_a_cancelled_request_says_so() -> None:
    async with serving(scripted(text("a"), 5.0)) as server:
        to = target(server)
        async with Client(to, Clock()) as client:
            record = Record(number=0, wanted_input=1, wanted_output=1)
            task = asyncio.create_task(client.send(to.encode([1], 1), record))
            while record.first < 0:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert record.error == "interrupted"


def test_an_error_of_null_is_none() -> None:
    record = Record(number=0, wanted_input=1, wanted_output=1)
    state = StreamState(record, chat=False)
    state.take(b'{"choices": [{"text": "a", "finish_reason": "stop"}], "error": null, "usage": null}', 1.0)
    state.close()
    assert (record.error, record.output_tokens) == ("", 1)
