"""One whole run against a server: wait until it answers, warm it up, send the workload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tokenloom.bench.load.client import Client, Target
from tokenloom.bench.load.prompts import Prompts, Vocabulary
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.runner import Clock, Loader, Run
from tokenloom.bench.load.workload import Session, Turn
from tokenloom.errors import TokenloomError

RETRY_SECONDS: Final = 0.5
_WARM_UP_SEED: Final = 1 << 40
"""Added to the seed for warm-ups, whose prompts must not be found in a prefix cache later."""


async def run_benchmark(
    target: Target,
    sessions: Sequence[Session],
    vocabulary: Vocabulary | None,
    *,
    seed: int = 0,
    num_warmups: int = 0,
    max_concurrency: int = 0,
    duration: float = 0.0,
    ready_timeout: float = 0.0,
    on_done: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Run `sessions`; `vocabulary` may be None where every prompt is a text.

    Raises `TokenloomError` if the server does not answer a first request within `ready_timeout` seconds (0
    does not ask), or refuses it.
    """
    prompts = None if vocabulary is None else Prompts(vocabulary, seed)
    others = None if vocabulary is None else Prompts(vocabulary, seed + _WARM_UP_SEED)

    def encode(turn: Turn, number: int) -> bytes:
        prompt = turn.text if prompts is None else prompts.make(turn, number)
        return target.encode(prompt or "", turn.output_tokens)

    def encode_warm_up(turn: Turn, number: int) -> bytes:
        # A text that begins differently shares no prefix with the one that is sent later.
        prompt = f"{number} {turn.text}" if others is None or turn.text else others.make(turn, number)
        return target.encode(prompt, turn.output_tokens)

    clock = Clock()
    async with Client(target, clock) as client:
        turns = [turn for session in sessions for turn in session.turns[:1]]
        if ready_timeout and turns:
            probe = replace(turns[0], input_tokens=min(turns[0].input_tokens, 32), output_tokens=1, blocks=())
            await _wait_ready(client, encode_warm_up(probe, 0), ready_timeout, target.url)
        if num_warmups:
            repeated = [turns[number % len(turns)] for number in range(num_warmups)]
            loader = Loader(
                client,
                encode_warm_up,
                clock,
                max_concurrency=max_concurrency,
                first_number=1,
            )
            first = await loader.run([Session(0.0, (replace(turn, then=()),)) for turn in repeated])
            if first.interrupted:
                return replace(first, records=[])
        loader = Loader(
            client,
            encode,
            clock,
            max_concurrency=max_concurrency,
            duration=duration,
            on_done=on_done,
        )
        return await loader.run(sessions)


async def _wait_ready(client: Client, body: bytes, timeout: float, url: str) -> None:
    """Send the body again and again until it is answered."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while True:
        record = Record(number=-1, wanted_input=0, wanted_output=1)
        await client.send(body, record)
        if record.ok:
            return
        # 503 is a server that loads, 429 one that is busy; other refusals stay.
        if record.error.startswith("HTTP 4") and record.error != "HTTP 429":
            raise TokenloomError(f"{url} refused the first request: {record.error}: {record.detail}")
        if record.error in ("invalid URL", "no event stream"):
            raise TokenloomError(f"{url}: {record.error}: {record.detail}")
        if loop.time() + RETRY_SECONDS > end:
            raise TokenloomError(
                f"{url} did not answer within {timeout:g} s: {record.error} {record.detail}".rstrip()
            )
        await asyncio.sleep(RETRY_SECONDS)
