"""Events of the step loop that are too long for one frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.helpers import alone, request, simulated_parts
from tokenloom.engine.plan import StepRecord
from tokenloom.errors import InvalidParameter
from tokenloom.serving import messages
from tokenloom.serving.messages import (
    Add,
    Command,
    Event,
    ProtocolError,
    RequestFailed,
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
