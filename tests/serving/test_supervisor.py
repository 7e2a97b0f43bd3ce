"""The engine process: served, killed, started again, never left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from tests.serving.helpers import POISON, alone, collect, request
from tokenloom.config import make_config
from tokenloom.engine.plan import StepRecord
from tokenloom.errors import ContextLengthExceeded, EngineDead, InvalidParameter
from tokenloom.serving import supervisor
from tokenloom.serving.messages import Cancel, Loading
from tokenloom.serving.supervisor import ProcessEngineClient

SECONDS = 60.0

pytestmark = pytest.mark.usefixtures("importable")


def make_client(directory: Path, *arguments: str) -> ProcessEngineClient:
    config = make_config({"model": str(directory), "max_running": 32, "max_waiting": 64}, env={})
    return ProcessEngineClient(
        config, command=(sys.executable, "-m", "tests.serving.simulated_process", *arguments)
    )


@asynccontextmanager
async def serving(directory: Path, *arguments: str) -> AsyncIterator[ProcessEngineClient]:
    client = make_client(directory, *arguments)
    await client.start()
    try:
        async with asyncio.timeout(SECONDS):
            await client.wait_ready()
            yield client
    finally:
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits for its parent does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_requests_of_a_process_equal_those_of_an_engine_alone(tokenizer_directory: Path) -> None:
    requests = [request(f"r{i}", range(1, 2 + i), seed=i, n=1 + i % 3) for i in range(40)]
    expected = [
        alone(tokenizer_directory, request(f"r{i}", range(1, 2 + i), seed=i, n=1 + i % 3)) for i in range(40)
    ]
    records: list[StepRecord] = []
    client = make_client(tokenizer_directory)
    with pytest.raises(EngineDead, match="loading"):
        _ = client.card
    await client.start()
    assert client.state == "loading"
    with pytest.raises(EngineDead, match="loading"):
        await collect(client.generate(request("early")))
    client.subscribe(records.append)
    async with asyncio.timeout(SECONDS):
        await client.wait_ready()
        assert client.card.name == "simulated"
        assert client.tokenizer.encode("a", False)
        outputs = await asyncio.gather(*(collect(client.generate(r)) for r in requests))
        with pytest.raises(ContextLengthExceeded, match="512"):
            await collect(client.generate(request("long", [1] * 600)))
        with pytest.raises(InvalidParameter, match="stop_token_ids"):
            await collect(client.generate(request("bad", stop_token_ids=[100_000])))
        with pytest.raises(InvalidParameter):
            await collect(client.generate(request("surrogate", stop="\ud800")))
        await until(lambda: sum(r.num_finished for r in records) == 40)
    pid = client.process_id
    assert pid is not None
    assert is_alive(pid)
    await client.close()
    assert outputs == expected
    assert client.state == "stopped"
    assert not is_alive(pid)
    with pytest.raises(EngineDead, match="stopped"):
        await collect(client.generate(request("late")))


async def test_cancel_reaches_the_process(tokenizer_directory: Path) -> None:
    records: list[StepRecord] = []
    async with serving(tokenizer_directory, "0.002") as client:
        client.subscribe(records.append)
        stream = client.generate(request("r", max_tokens=500))
        await anext(stream)
        await stream.aclose()
        await collect(client.generate(request("other", max_tokens=20)))
        assert records[-1].num_running == 0
        assert records[-1].pages_used == 0
        assert client.num_in_flight == 0


async def test_a_killed_engine_fails_its_requests_and_comes_back(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, "0.002") as client:
        streams = [client.generate(request(f"r{i}", max_tokens=500)) for i in range(5)]
        for stream in streams:
            await anext(stream)
        killed = client.process_id
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        results = await asyncio.gather(*(collect(s) for s in streams), return_exceptions=True)
        assert time.monotonic() - started < 1.0
        for result in results:
            assert isinstance(result, EngineDead)
            assert "killed by SIGKILL" in str(result)
        assert client.num_in_flight == 0
        assert client.state == "restarting"
        with pytest.raises(EngineDead, match="restarting"):
            await collect(client.generate(request("meanwhile")))
        await client.wait_ready()
        assert client.num_restarts == 1
        assert client.process_id != killed
        assert await collect(client.generate(request("r"))) == alone(tokenizer_directory, request("r"))


async def test_a_failing_step_restarts_the_engine(
    tokenizer_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving(tokenizer_directory, "0.001") as client:
        running = asyncio.create_task(collect(client.generate(request("r", max_tokens=500))))
        await until(lambda: client.num_in_flight == 1)
        with pytest.raises(EngineDead, match="a step failed: RuntimeError: poisoned step"):
            await collect(client.generate(request("poison", [POISON])))
        with pytest.raises(EngineDead):
            await running
        await client.wait_ready()
        assert len((await collect(client.generate(request("r"))))[0]) == 8
    assert "Traceback" in capfd.readouterr().err


async def test_a_checkpoint_that_cannot_be_loaded_is_not_tried_again(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent("""
        import sys
        from tokenloom.errors import ModelError
        from tokenloom.serving.engine_process import main

        def build(config, listener):
            listener.plan("the plan")
            listener.advance("weights", 1, 2)
            raise ModelError("a strange file", "another file")

        sys.exit(main(build))
    """)
    heard: list[Loading] = []
    config = make_config({"model": str(tokenizer_directory)}, env={})
    client = ProcessEngineClient(config, command=(sys.executable, "-c", script), on_loading=heard.append)
    await client.start()
    with pytest.raises(EngineDead, match="found a strange file; supported: another file"):
        await client.wait_ready(SECONDS)
    assert client.state == "failed"
    assert client.num_restarts == 0
    assert heard == [Loading("weights", 1, 2)]
    await client.close()

    client = make_client(tmp_path / "nowhere")
    await client.start()
    with pytest.raises(EngineDead, match="no directory"):
        await client.wait_ready(SECONDS)
    await client.close()


async def test_the_current_directory_is_not_searched_for_modules(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    monkeypatch.chdir(tmp_path)
    client = ProcessEngineClient(make_config({"model": str(tiny_model), "num_pages": 64}, env={}))
    await client.start()
    try:
        await client.wait_ready(SECONDS)
    finally:
        await client.close()


async def test_a_peer_that_is_gone_before_its_death_is_noticed(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory) as client:
        process = client.process_id
        with zmq.Context() as context, context.socket(zmq.PAIR) as alone_socket:
            alone_socket.bind(f"inproc://nobody-{process}")
            served, client._socket = client._socket, alone_socket
            try:
                with pytest.raises(EngineDead, match="has just ended"):
                    await collect(client.generate(request("r")))
                assert client.num_in_flight == 0
                client._send(Cancel("r"))
            finally:
                client._socket = served
        assert len((await collect(client.generate(request("r"))))[0]) == 8


async def test_an_engine_that_keeps_dying_is_given_up(
    tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "tokenloom")
    monkeypatch.setattr(supervisor, "MAX_BACKOFF", 0.01)
    config = make_config({"model": str(tokenizer_directory)}, env={})
    script = "import sys; print('out of luck', file=sys.stderr); sys.exit(7)"
    client = ProcessEngineClient(config, command=(sys.executable, "-c", script))
    await client.start()
    with pytest.raises(EngineDead, match="exit code 7; it died 5 times within 60 s") as error:
        await client.wait_ready(SECONDS)
    assert "out of luck" in str(error.value)
    assert client.num_restarts == supervisor.MAX_DEATHS - 1
    await client.close()


async def test_close_while_loading_and_with_requests_in_flight(tokenizer_directory: Path) -> None:
    client = make_client(tokenizer_directory)
    await client.start()
    await until(lambda: client.process_id is not None)
    pid = client.process_id
    await client.close()
    assert pid is not None
    assert not is_alive(pid)

    async with serving(tokenizer_directory, "0.002") as client:
        running = asyncio.create_task(collect(client.generate(request("r", max_tokens=500))))
        await until(lambda: client.num_in_flight == 1)
        await client.close()
        with pytest.raises(EngineDead, match="stopped"):
            await running


async def test_the_engine_ends_when_its_parent_is_killed(tokenizer_directory: Path) -> None:
    script = textwrap.dedent("""
        import asyncio, pathlib, sys
        from tests.serving.test_supervisor import make_client

        async def main():
            client = make_client(pathlib.Path(sys.argv[1]))
            await client.start()
            await client.wait_ready()
            endpoint = client._socket.getsockopt_string(__import__("zmq").LAST_ENDPOINT)
            print(client.process_id, endpoint.removeprefix("ipc://"), flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tokenizer_directory), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(SECONDS):
        pid, path = (await parent.stdout.readline()).decode().split()
    assert is_alive(int(pid))
    parent.kill()
    await parent.wait()
    await until(lambda: not is_alive(int(pid)))
    await until(lambda: not Path(path).parent.exists())
