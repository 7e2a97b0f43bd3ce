"""The wire between API process and engine process."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.adapter_pool import AdapterUse
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import Request, RequestTimings, SequenceDelta, Slo, TokenLogprobs
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidParameter,
    ModelError,
    OutOfMemory,
    QueueFull,
    TokenloomError,
    UnsupportedFeature,
)
from tokenloom.runtime.adapter_host import AdapterFile
from tokenloom.serving.client import ModelCard
from tokenloom.serving.messages import (
    MAX_FRAME_BYTES,
    MAX_REQUEST_ID_CHARS,
    AdapterDone,
    AdapterFailed,
    Add,
    Cancel,
    Command,
    Event,
    Fatal,
    LoadAdapter,
    Loading,
    PinAdapter,
    ProtocolError,
    Ready,
    ReportAdapters,
    RequestFailed,
    RetireAdapter,
    Shutdown,
    Stepped,
    decode_command,
    decode_event,
    encode,
    error_body,
    rebuild_error,
)

CARD = ModelCard(
    name="m",
    created=1,
    max_context=2,
    vocab_size=3,
    max_running=4,
    max_requests=5,
    default_sampling={"temperature": 0.5, "top_k": 3},
)


def over_the_wire(error: Exception) -> TokenloomError:
    event = decode_event(encode(RequestFailed("r", error_body(error))))
    assert isinstance(event, RequestFailed)
    return rebuild_error(event.error)


def _record(step: int) -> StepRecord:
    return StepRecord(step, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, {"plan": 0.25, "execute": 0.5})


def _delta(i: int, *, last: bool = False) -> SequenceDelta:
    best = tuple((token, -0.5 * token) for token in range(5))
    return SequenceDelta(
        f"cmpl-{i:032x}",
        i % 3,
        [i, 7],
        [TokenLogprobs(i, -1.25, 2, best)],
        "stop" if last else None,
        "END" if last else None,
        [TokenLogprobs(1, -2.0, 1, ())] if last else None,
        16,
        last,
        RequestTimings(1.0, 2.0, 3.0, 4.0) if last else None,
    )


def test_commands_survive_the_wire() -> None:
    params = SamplingParams(
        n=2,
        temperature=0.5,
        logit_bias={3: -1.5},
        allowed_token_ids=[1, 2],
        bad_words=["ab"],
        stop=["x", "é"],
        stop_token_ids=[5],
        seed=(1 << 64) - 1,
        max_tokens=None,
        logprobs=3,
    )
    request = Request(
        request_id="r",
        prompt_token_ids=[1, 2, 70000],
        params=params,
        priority=-3,
        tenant="t",
        adapter="a",
        exactness="distribution",
        program_id="p",
        bad_word_ids=((1, 2), (3,)),
        slo=Slo(tpot=0.04),
        arrival=2.5,
    )
    commands: tuple[Command, ...] = (
        Add(request),
        Cancel("r"),
        LoadAdapter(1, "a", "b"),
        LoadAdapter(1, "a", "b", {"draft": AdapterFile("c", "d")}),
        RetireAdapter("a"),
        PinAdapter(2, "a", True),
        ReportAdapters(3),
        Shutdown(),
    )
    for command in commands:
        assert decode_command(encode(command)) == command


@pytest.mark.parametrize(
    "event",
    [
        Loading("weights", 3, 1 << 40),
        Ready(CARD),
        Stepped([_delta(1), _delta(2, last=True)], [_record(1), _record(2)]),
        RequestFailed("r", error_body(QueueFull(3, 1.5))),
        AdapterDone(4),
        AdapterDone(5, [AdapterUse("a", 1 << 40, 2, 1, 0.5, True)]),
        AdapterFailed(6, "a", error_body(ModelError("this", "that"))),
        Fatal(error_body(ModelError("this", "that")), retry=False),
    ],
)
def test_events_survive_the_wire(event: Event) -> None:
    assert decode_event(encode(event)) == event


@pytest.mark.parametrize(
    "error",
    [
        InvalidParameter("temperature", -1.0, "a number from 0 to 100"),
        InvalidParameter("n", 500, "small", code="too_large"),
        ContextLengthExceeded(5000, 4096, "messages"),
        QueueFull(1024, 2.5),
        UnsupportedFeature("tools", "not yet"),
        ModelError("found", "supported"),
        OutOfMemory("too large"),
        EngineDead("gone"),
    ],
)
def test_errors_are_rebuilt_with_class_and_fields(error: TokenloomError) -> None:
    rebuilt = over_the_wire(error)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert vars(rebuilt) == vars(error)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, 1 << 70, object])
def test_values_without_a_wire_form_are_shown(value: object) -> None:
    error = InvalidParameter("prompt", value, "simple")
    rebuilt = over_the_wire(error)
    assert isinstance(rebuilt, InvalidParameter)
    assert rebuilt.value == repr(value)
    assert str(rebuilt) == str(error)


def test_other_errors_become_internal_ones() -> None:
    rebuilt = over_the_wire(ZeroDivisionError("oh"))
    assert type(rebuilt) is TokenloomError
    assert str(rebuilt) == "ZeroDivisionError: oh"


@given(st.binary(max_size=64))
def test_garbage_is_refused(data: bytes) -> None:
    for decode in (decode_command, decode_event):
        try:
            decode(data)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    "value",
    [
        ["add"],
        ["add", {"request_id": "r"}],
        ["add", {"request_id": 5, "prompt_token_ids": []}],
        ["add", {"request_id": "r", "prompt_token_ids": [1.5]}],
        ["add", {"request_id": "r", "prompt_token_ids": [1], "params": {"temperature": -1.0}}],
        ["add", {"request_id": "x" * (MAX_REQUEST_ID_CHARS + 1), "prompt_token_ids": [1]}],
        ["ready", {}],
        ["cancel", 1],
        ["run", "code"],
    ],
)
def test_wrong_commands_are_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        decode_command(msgspec.msgpack.encode(value))


def test_what_cannot_be_encoded_or_is_too_long_is_refused() -> None:
    command: Command = Cancel("\ud800")
    with pytest.raises(ProtocolError):
        encode(command)
    with pytest.raises(ProtocolError, match=str(MAX_FRAME_BYTES)):
        decode_command(bytes(MAX_FRAME_BYTES + 1))


def test_a_step_of_64_deltas_costs_well_below_a_millisecond() -> None:
    event = Stepped([_delta(i, last=i == 0) for i in range(64)], [_record(1)])
    frame = encode(event)
    best = float("inf")
    for _ in range(50):
        started = time.perf_counter()
        encode(event)
        decode_event(frame)
        best = min(best, time.perf_counter() - started)
    assert best < 0.5e-3
