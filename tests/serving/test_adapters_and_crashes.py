"""An engine process with adapters, killed: the next one is told of them, and gives the same answers."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from tests.serving.helpers import collect, request
from tests.serving.peft_adapters import agreement_with_peft, write_adapter
from tokenloom.config import make_config
from tokenloom.errors import EngineDead, InvalidParameter, ModelError, QueueFull, TokenloomError
from tokenloom.serving.adapter_service import AdapterService
from tokenloom.serving.assembly import open_library
from tokenloom.serving.supervisor import ProcessEngineClient

SECONDS = 120.0
MODEL = "tiny"
PROMPT = [1, 70, 9, 200, 33]

pytestmark = pytest.mark.usefixtures("importable")


@asynccontextmanager
async def serving(
    model: Path, adapter: tuple[str, ...] = (), **options: object
) -> AsyncIterator[tuple[ProcessEngineClient, AdapterService]]:
    config = make_config(
        {
            "model": str(model),
            "dtype": "float32",
            "threads": 1,
            "num_pages": 2048,
            "adapter": adapter,
            **options,
        },
        env={},
    )
    with closing(open_library(config)) as library:
        client = ProcessEngineClient(config)
        adapters = AdapterService(client, library, model=MODEL, options=config.adapters)
        adapters.load_configured()
        await client.start()
        adapters.start()
        try:
            async with asyncio.timeout(SECONDS):
                await client.wait_ready()
                yield client, adapters
        finally:
            await client.close()
            await adapters.close()


async def tokens_of(
    client: ProcessEngineClient, adapters: AdapterService, adapter: str, name: str, count: int = 24
) -> list[int]:
    """A greedy output; asked for again as long as the engine dies under it."""
    while True:
        lease = adapters.lease(adapter) if adapter else None
        wanted = request(name, PROMPT, temperature=0.0, max_tokens=count, ignore_eos=True)
        wanted.adapter = lease.content_id if lease else ""
        try:
            return (await collect(client.generate(wanted)))[0]
        except EngineDead:
            await client.wait_ready()
        finally:
            if lease is not None:
                lease.release()


async def kill(client: ProcessEngineClient) -> None:
    """Kill the engine process, and wait for the next one."""
    assert client.process_id is not None
    restarts = client.num_restarts
    os.kill(client.process_id, signal.SIGKILL)
    while client.num_restarts == restarts:
        await asyncio.sleep(0.01)
    await client.wait_ready()


def test_the_next_engine_knows_them(tiny_model: Path, tmp_path: Path) -> None:
    paths = {f"a{i}": write_adapter(tmp_path / f"a{i}", i, rank=2 + i) for i in range(3)}

    async def run() -> None:
        named = tuple(f"{name}={path}" for name, path in list(paths.items())[:2])
        async with serving(tiny_model, named) as (client, adapters):
            await adapters.load("a2", paths["a2"])
            await adapters.pin("a1", on=True)
            names = ["", *paths]
            before = [await tokens_of(client, adapters, name, f"x{name}") for name in names]
            for name, tokens in zip(names, before, strict=True):
                assert agreement_with_peft(tiny_model, paths.get(name), PROMPT, tokens) > 12
            running = [
                asyncio.create_task(tokens_of(client, adapters, name, f"y{name}{i}", 100))
                for i in range(3)
                for name in names
            ]
            await asyncio.sleep(0.05)
            await kill(client)
            found = await asyncio.gather(*running)
            assert [tokens[:24] for tokens in found] == before * 3
            assert len({str(tokens) for tokens in found}) == len(names)
            uses = {use.adapter: use for use in await client.adapters.uses()}
            pinned = [content for content, use in uses.items() if use.pinned]
            assert pinned == [adapters.lease("a1").content_id]
            # What went and came meanwhile is as it should be.
            await adapters.unload("a0")
            await kill(client)
            assert await tokens_of(client, adapters, "a2", "z", 24) == before[-1]
            assert len(await client.adapters.uses()) == 2

    asyncio.run(run())


def test_the_next_engine_knows_those_of_the_draft(tiny_model: Path, tmp_path: Path) -> None:
    """A content whose draft adapter was replaced, and one that an engine did not take."""
    path, other = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "large", 2, rank=250)

    async def run() -> None:
        options = {"speculate": ("draft",), "draft_model": (str(tiny_model),), "draft_pace": "fixed"}
        write_adapter(path / "draft", 2)
        async with serving(tiny_model, (f"a={path}",), max_adapter_mb=1, **options) as (client, adapters):
            before = await tokens_of(client, adapters, "a", "x", 60)
            write_adapter(path / "draft", 1)
            served = await adapters.load("a", path)
            assert served.prepared.draft_contents == {"draft": served.content_id}
            await kill(client)
            assert await tokens_of(client, adapters, "a", "y", 60) == before
            for file in other.iterdir():
                shutil.copy(file, path / "draft")
            with pytest.raises(InvalidParameter, match="adapter of the draft model draft"):
                await adapters.load("a", path)
            await kill(client)
            assert client.adapters.refusal(served.content_id) is None
            assert await tokens_of(client, adapters, "a", "z", 60) == before

    asyncio.run(run())


def test_errors_of_the_engine_come_back(tiny_model: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x", 1)

    async def run() -> None:
        async with serving(tiny_model) as (client, adapters):
            served = await adapters.load("x", path)
            broken = tmp_path / "broken.image"
            broken.write_bytes(b"no image")
            with pytest.raises(ModelError, match="an adapter image"):
                await client.adapters.load("0" * 32, broken)
            with pytest.raises(InvalidParameter, match="loaded"):
                await client.adapters.pin("0" * 32, on=True)
            client.adapters.retire("0" * 32)
            unknown = request("r", PROMPT)
            unknown.adapter = "0" * 32
            with pytest.raises(InvalidParameter, match="an adapter that is loaded"):
                await collect(client.generate(unknown))
            assert client.process_id is not None
            os.kill(client.process_id, signal.SIGKILL)
            waiting = asyncio.create_task(client.adapters.uses())
            with pytest.raises((EngineDead, TokenloomError)):
                await waiting
            with pytest.raises(EngineDead):
                await adapters.load("y", write_adapter(tmp_path / "y", 2))
            assert adapters.names() == ("x",)
            await client.wait_ready()
            assert await tokens_of(client, adapters, "x", "again")
            assert served.content_id == adapters.lease("x").content_id

    asyncio.run(run())


def test_what_is_named_at_the_start_must_be_there(tiny_model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "x", 1)
    for adapter in ("x", "=", f"a:b={tmp_path}/x", f"{MODEL}={tmp_path}/x", "x=/nowhere"):

        async def run(adapter: str = adapter) -> None:
            async with serving(tiny_model, (adapter,)):
                raise AssertionError("it serves")

        with pytest.raises((InvalidParameter, ModelError), match="adapter|/nowhere"):
            asyncio.run(run())


def test_a_queue_full_of_waiting_adapters(tiny_model: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x", 1)

    async def run() -> None:
        options = {"max_running": 1, "max_waiting": 1}
        async with serving(tiny_model, (f"x={path}",), **options) as (client, adapters):
            found = await asyncio.gather(
                *(tokens_of(client, adapters, "x", f"r{i}") for i in range(5)), return_exceptions=True
            )
            assert sum(isinstance(one, QueueFull) for one in found) == 3

    asyncio.run(run())


def test_what_the_engine_has_no_room_for(tiny_model: Path, tmp_path: Path) -> None:
    """Named at the start: an error. From an earlier run: left out, and the others are served."""
    large, small = write_adapter(tmp_path / "large", 1, rank=220), write_adapter(tmp_path / "small", 2)
    data = str(tmp_path / "data")

    async def named() -> None:
        async with serving(tiny_model, (f"large={large}",), max_adapter_mb=1) as (_, adapters):
            with pytest.raises(InvalidParameter, match="at most 1024 KiB"):
                await adapters.confirm()

    async def earlier(max_adapter_mb: int, names: tuple[str, ...]) -> None:
        async with serving(tiny_model, (f"small={small}",), data_dir=data, max_adapter_mb=max_adapter_mb) as (
            client,
            adapters,
        ):
            if max_adapter_mb == 0:
                await adapters.load("large", large)
            await adapters.confirm()
            assert adapters.names() == names
            assert await tokens_of(client, adapters, "small", "r")

    asyncio.run(named())
    asyncio.run(earlier(0, ("large", "small")))
    asyncio.run(earlier(1, ("small",)))
    asyncio.run(earlier(64, ("large", "small")))
