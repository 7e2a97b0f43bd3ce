"""Events of the step loop that are too long for one frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.helpers import alone, request, simulated_parts
from tokenloom.engine.plan import StepRecord
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.serving import messages
from tokenloom.serving.messages import (
    AdapterDone,
    AdapterFailed,
    Add,
    Command,
    Event,
    LoadAdapter,
    PinAdapter,
    ProtocolError,
    ReportAdapters,
    RequestFailed,
    RetireAdapter,
    Shutdown,
    Stepped,
    encode,
    rebuild_error,
)
from tokenloom.serving.step_loop import StepLoop


def run(directory: Path, commands: list[Command]) -> list[Event]:
    """The events of a loop that gets all commands at once and stops when it is idle."""
    loop: StepLoop
    events: list[Event] = []

    def receive(block: bool) -> Iterator[Command]:
        yield from commands
        commands.clear()
        if block and not loop.engine.has_work:
            yield Shutdown()

    def emit(event: Event) -> None:
        encode(event)
        events.append(event)

    loop = StepLoop(simulated_parts(directory).engine, receive, emit)
    loop.run()
    assert not loop.engine.scheduler.cache.references
    return events


def tokens_of(events: list[Event], name: str) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, Stepped)
        for delta in event.deltas
        if delta.request_id == name
        for token in delta.token_ids
    ]


@pytest.fixture
def short_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 1500)


@pytest.mark.usefixtures("short_frames")
def test_a_long_step_goes_in_several_frames(tokenizer_directory: Path) -> None:
    names = [f"{i:0200d}" for i in range(12)]
    events = run(tokenizer_directory, [Add(request(name)) for name in names])
    assert not any(isinstance(event, RequestFailed) for event in events)
    for name in names:
        assert tokens_of(events, name) == alone(tokenizer_directory, request(name))[0]
    records: list[StepRecord] = [r for e in events if isinstance(e, Stepped) for r in e.records]
    assert [record.step for record in records] == sorted({record.step for record in records})


@pytest.mark.usefixtures("short_frames")
def test_a_request_that_fits_no_frame_fails_alone(tokenizer_directory: Path) -> None:
    long = request("long", [1, 2, 3] * 40, n=2, prompt_logprobs=3)
    with pytest.raises(ProtocolError):
        encode(Add(request("x", [1000] * 2000)))
    events = run(tokenizer_directory, [Add(request("a")), Add(long), Add(request("b"))])
    [failure] = [event for event in events if isinstance(event, RequestFailed)]
    assert failure.request_id == "long"
    error = rebuild_error(failure.error)
    assert isinstance(error, InvalidParameter)
    assert error.param == "prompt_logprobs"
    assert "119 prompt tokens" in str(error)
    for name in ("a", "b"):
        assert tokens_of(events, name) == alone(tokenizer_directory, request(name))[0]
    assert not tokens_of(events[events.index(failure) :], "long")


def test_an_executor_without_adapters_refuses_them(tokenizer_directory: Path) -> None:
    """By name, one command at a time; requests go on."""
    with_adapter = request("adapted")
    with_adapter.adapter = "a"
    events = run(
        tokenizer_directory,
        [
            LoadAdapter(1, "a", "/nowhere"),
            PinAdapter(2, "a", on=True),
            PinAdapter(3, "a", on=False),
            RetireAdapter("a"),
            ReportAdapters(4),
            Add(with_adapter),
            Add(request("base")),
        ],
    )
    failed = {event.ticket: event.error for event in events if isinstance(event, AdapterFailed)}
    assert isinstance(rebuild_error(failed[1]), UnsupportedFeature)
    assert isinstance(rebuild_error(failed[2]), InvalidParameter)
    assert [event for event in events if isinstance(event, AdapterDone)] == [AdapterDone(3), AdapterDone(4)]
    (refused,) = (event for event in events if isinstance(event, RequestFailed))
    assert refused.request_id == "adapted"
    assert "an adapter that is loaded" in refused.error.message
    assert tokens_of(events, "base") == alone(tokenizer_directory, request("base"))[0]
