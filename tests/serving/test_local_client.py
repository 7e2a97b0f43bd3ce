"""The engine in a background thread, and what all clients of engines have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.helpers import EOS, POISON, SlowExecutor, alone, collect, request, simulated_parts
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import ContextLengthExceeded, EngineDead, InvalidParameter, QueueFull, TokenloomError
from tokenloom.serving.local_client import ThreadEngineClient

SECONDS = 60.0


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[ThreadEngineClient]:
    parts = simulated_parts(directory, **options)
    client = ThreadEngineClient(parts.engine, parts.tokenizer, parts.card, seeds=parts.seeds)
    await client.start()
    try:
        async with asyncio.timeout(SECONDS):
            yield client
    finally:
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


async def test_alone_or_together_a_request_gets_the_same(tokenizer_directory: Path) -> None:
    requests = [request(f"r{i}", range(1, 2 + i), seed=i, n=1 + i % 3) for i in range(40)]
    expected = [
        alone(tokenizer_directory, request(f"r{i}", range(1, 2 + i), seed=i, n=1 + i % 3)) for i in range(40)
    ]
    async with serving(tokenizer_directory) as client:
        assert client.state == "ready"
        outputs = await asyncio.gather(*(collect(client.generate(r)) for r in requests))
        assert client.num_in_flight == 0
        assert len(client.journal) == 0
    assert outputs == expected


async def test_closing_the_stream_cancels(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, step_seconds=0.002) as client:
        stream = client.generate(request("r", max_tokens=400))
        await anext(stream)
        assert client.num_in_flight == 1
        await stream.aclose()
        assert client.num_in_flight == 0
        await until(lambda: not client._engine.has_work)
        assert not client._engine.scheduler.cache.references


async def test_cancelling_the_task_cancels(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, step_seconds=0.002) as client:
        task = asyncio.create_task(collect(client.generate(request("r", max_tokens=400))))
        await until(lambda: client._engine.has_work)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not client._engine.has_work)
        assert client.num_in_flight == 0


async def test_each_bad_request_fails_alone(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, step_seconds=0.001) as client:
        good = asyncio.create_task(collect(client.generate(request("good", max_tokens=50))))
        await until(lambda: client.num_in_flight == 1)
        with pytest.raises(InvalidParameter, match="request_id"):
            await anext(client.generate(request("good")))
        with pytest.raises(InvalidParameter, match="request_id"):
            await anext(client.generate(request("x" * 1000)))
        with pytest.raises(ContextLengthExceeded) as too_long:
            await anext(client.generate(request("long", [1] * 600)))
        assert (too_long.value.value, too_long.value.code) == (600, "context_length_exceeded")
        with pytest.raises(InvalidParameter) as bad_token:
            await anext(client.generate(request("token", [100_000])))
        assert bad_token.value.param == "prompt"
        assert len((await good)[0]) == 50


async def test_more_than_the_queue_holds_is_refused(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, step_seconds=0.001, max_running=1, max_waiting=2) as client:
        streams = [client.generate(request(f"r{i}", max_tokens=20)) for i in range(8)]
        results = await asyncio.gather(*(collect(s) for s in streams), return_exceptions=True)
        refused = [r for r in results if isinstance(r, QueueFull)]
        served = [r for r in results if isinstance(r, dict)]
        assert len(refused) + len(served) == 8
        assert len(refused) >= 5
        assert served
        assert len((await collect(client.generate(request("later"))))[0]) == 8


async def test_a_failing_stop_checker_ends_only_its_request(
    tokenizer_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        def push(self, token_id: int) -> str | None:
            raise ValueError("no text")

    def factory(prompt: Sequence[int], params: SamplingParams) -> Failing:
        if params.stop == ("creation",):
            raise ValueError("no checker")
        return Failing()

    parts = simulated_parts(tokenizer_directory)
    parts.engine.stop_checkers = factory
    client = ThreadEngineClient(parts.engine, parts.tokenizer, parts.card)
    await client.start()
    caplog.set_level(logging.CRITICAL, "tokenloom")
    async with asyncio.timeout(SECONDS):
        results = await asyncio.gather(
            collect(client.generate(request("a", stop="x"))),
            collect(client.generate(request("b"))),
            collect(client.generate(request("c", stop="creation"))),
            return_exceptions=True,
        )
    assert isinstance(results[0], TokenloomError)
    assert "no text" in str(results[0])
    assert isinstance(results[2], TokenloomError)
    assert results[1] == alone(tokenizer_directory, request("b"))
    parts.engine.check()
    await client.close()


async def test_a_failing_step_ends_everything_clearly(
    tokenizer_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "tokenloom")
    async with serving(tokenizer_directory, step_seconds=0.002) as client:
        running = asyncio.create_task(collect(client.generate(request("r", max_tokens=400))))
        await until(lambda: client._engine.has_work)
        with pytest.raises(EngineDead, match="poisoned step"):
            await collect(client.generate(request("poison", [POISON])))
        with pytest.raises(EngineDead, match=r"had got \d+ tokens"):
            await running
        assert client.state == "failed"
        with pytest.raises(EngineDead, match="failed: RuntimeError: poisoned step"):
            await collect(client.generate(request("later")))


async def test_slow_consumers_do_not_hold_the_engine(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory) as client:
        slow = client.generate(request("slow", max_tokens=300))
        first = await anext(slow)
        await until(lambda: not client._engine.has_work)
        assert len((await collect(client.generate(request("fast"))))[0]) == 8
        rest = await collect(slow)
        assert len(first.token_ids) + len(rest[0]) == 300


async def test_every_step_is_observed(tokenizer_directory: Path) -> None:
    records: list[StepRecord] = []

    def broken(record: StepRecord) -> None:
        raise ValueError("an observer's own trouble")

    async with serving(tokenizer_directory) as client:
        client.subscribe(broken)
        client.subscribe(records.append)
        await collect(client.generate(request("r", max_tokens=30)))
        await until(lambda: sum(r.num_finished for r in records) == 1)
    assert [r.step for r in records] == list(range(1, 31))
    assert sum(r.decode_rows for r in records) == 29


async def test_end_of_sequence_and_stop_strings(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory) as client:
        full = (await collect(client.generate(request("r"))))[0]
        stop = client.tokenizer.decode(full[3:5])
        deltas = [d async for d in client.generate(request("s", stop=stop))]
        assert [t for d in deltas for t in d.token_ids] == full[:5]
        assert (deltas[-1].finish_reason, deltas[-1].stop) == ("stop", stop)
        deltas = [
            d async for d in client.generate(request("e", logit_bias={EOS: 100}, stop_token_ids=[full[2]]))
        ]
        assert [t for d in deltas for t in d.token_ids] == full[:3]
        assert (deltas[-1].finish_reason, deltas[-1].stop) == ("stop", full[2])


async def test_close_ends_what_runs(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, step_seconds=0.002) as client:
        running = asyncio.create_task(collect(client.generate(request("r", max_tokens=400))))
        await until(lambda: client._engine.has_work)
        await client.close()
        with pytest.raises(EngineDead, match="stopped"):
            await running
        executor = client._engine.executor
        assert isinstance(executor, SlowExecutor)
        assert executor.closed
        assert client.state == "stopped"


async def test_seeds_are_derived_in_order(tokenizer_directory: Path) -> None:
    async def texts(base: int) -> list[dict[int, list[int]]]:
        async with serving(tokenizer_directory, seed=base) as client:
            unseeded = [request(f"r{i}") for i in range(3)]
            for r in unseeded:
                r.params = SamplingParams(max_tokens=8)
            return [await collect(client.generate(r)) for r in unseeded]

    first = await texts(7)
    assert first == await texts(7)
    assert first[0] != first[1]
    assert first != await texts(8)
    assert await texts(-1) != await texts(-1)
