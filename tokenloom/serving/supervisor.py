"""The engine process as the API process sees it: started, watched, started again.

Requests in flight when the engine dies end with `EngineDead` at once, except those for embeddings: nothing of them
has been sent, so the next engine is given them, once more each. Restarts back off, and stop when the engine dies
`MAX_DEATHS` times within `DEATH_WINDOW` seconds or cannot be built at all.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import zmq

from tokenloom.config import Config, flatten
from tokenloom.errors import EngineDead, TokenloomError
from tokenloom.serving.engine_process import Start
from tokenloom.serving.journal import JournalEntry
from tokenloom.serving.messages import (
    MAX_FRAME_BYTES,
    Add,
    Cancel,
    Command,
    Event,
    Fatal,
    Loading,
    ProtocolError,
    Ready,
    RetireAdapter,
    decode_event,
    encode,
)
from tokenloom.serving.model_directory import model_directory
from tokenloom.serving.streams import StreamingClient
from tokenloom.serving.threads import thread_environment
from tokenloom.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_DEATHS: Final = 5
DEATH_WINDOW: Final = 60.0
MAX_BACKOFF: Final = 5.0
MAX_ATTEMPTS: Final = 2
STOP_SECONDS: Final = 5.0
DRAIN_SECONDS: Final = 0.05
KEPT_STDERR_LINES: Final = 12
_MAX_SOCKET_PATH: Final = 100

# -P: a queue.py in the current directory is not the standard library's.
ENGINE_COMMAND: Final = (sys.executable, "-P", "-m", "tokenloom.serving.engine_process")


class Death(NamedTuple):
    """Why an engine process ended, and whether to start another."""

    reason: str
    retry: bool


class ProcessEngineClient(StreamingClient):
    """`EngineClient` over an engine process of its own.

    `command` starts the process (tests put another engine there). `on_loading` hears how loading goes on.
    """

    def __init__(
        self,
        config: Config,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._command = command
        self._on_loading = on_loading
        self._tokenizer: Tokenizer | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._fatal: Fatal | None = None
        self._stderr: collections.deque[str] = collections.deque(maxlen=KEPT_STDERR_LINES)
        self._supervision: asyncio.Task[None] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model. Raises `EngineDead` before it was loaded."""
        if self._tokenizer is None:
            raise EngineDead(self._why_not())
        return self._tokenizer

    @property
    def process_id(self) -> int | None:
        """The pid of the engine process that runs now."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the engine process; returns at once, `state` or `wait_ready` tells when it serves."""
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def close(self) -> None:
        """End what runs and stop the process: SIGTERM first, SIGKILL after `STOP_SECONDS`."""
        self._set_state("stopped")
        self._fail_all("the engine was stopped")
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision

    def _send(self, command: Command) -> None:
        frame = encode(command)
        if self._socket is not None and not self._socket.closed:
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                # The peer is gone and its death not noticed yet; nothing is left to cancel there, and the next
                # one will be told of adapters.
                if isinstance(command, (Cancel, RetireAdapter)):
                    return
                raise EngineDead("the engine process has just ended") from None
            finally:
                # The socket signals by edges, and sending may have taken one.
                asyncio.get_running_loop().call_soon(self._receive)

    # --- the life of the process -------------------------------------------------------------------------

    async def _supervise(self) -> None:
        model = self._config.model
        try:
            self._tokenizer = await asyncio.to_thread(
                Tokenizer.from_dir, model_directory(model.model, model.revision)
            )
            await self._keep_running()
        except TokenloomError as error:
            self._set_state("failed", str(error))
            log.error("%s", error)
        except Exception as error:
            self._set_state("failed", f"{type(error).__name__}: {error}")
            log.exception("the engine cannot be supervised")
        finally:
            self._fail_all("the engine is not watched any more")

    async def _keep_running(self) -> None:
        deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        while True:
            death = await self._run_once()
            self._set_state("restarting", death.reason)
            self._fail_all(death.reason, _may_start_again)
            now = time.monotonic()
            deaths.append(now)
            often = len(deaths) == MAX_DEATHS and now - deaths[0] < DEATH_WINDOW
            if often or not death.retry:
                self._give_up(
                    death, f"it died {MAX_DEATHS} times within {DEATH_WINDOW:.0f} s" if often else ""
                )
                return
            log.warning("%s; starting it again", death.reason)
            recent = sum(now - then < DEATH_WINDOW for then in deaths)
            await asyncio.sleep(min(0.1 * 4 ** (recent - 1), MAX_BACKOFF))
            self.num_restarts += 1

    def _give_up(self, death: Death, why: str) -> None:
        lines = [death.reason + (f"; {why}" if why else "")]
        if self._stderr and self._fatal is None:
            lines.append("its last words were:")
            lines.extend(self._stderr)
        self._set_state("failed", "\n".join(lines))
        self._fail_all(lines[0])
        log.error("%s", self._failure)

    async def _run_once(self) -> Death:
        """Run one engine process to its end."""
        loop = asyncio.get_running_loop()
        directory = _private_directory()
        context = zmq.Context()
        self._socket = socket = context.socket(zmq.PAIR)
        for option, value in (
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.LINGER, 0),
        ):
            socket.setsockopt(option, value)
        descriptor = int(socket.getsockopt(zmq.FD))
        endpoint = f"ipc://{directory}/engine"
        self._fatal = None
        self._stderr.clear()
        relay: asyncio.Task[None] | None = None
        try:
            socket.bind(endpoint)
            loop.add_reader(descriptor, self._receive)
            self._process = process = await self._spawn(endpoint)
            relay = asyncio.create_task(self._relay_stderr(process))
            code = await process.wait()
            # What it had sent may still be on its way; so may its last words.
            await asyncio.wait([relay], timeout=DRAIN_SECONDS)
            await asyncio.sleep(DRAIN_SECONDS)
            self._receive()
            return self._death(code)
        finally:
            loop.remove_reader(descriptor)
            await self._end_process()
            if relay is not None:
                relay.cancel()
            self._socket = None
            socket.close()
            context.term()
            shutil.rmtree(directory, ignore_errors=True)

    async def _spawn(self, endpoint: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=thread_environment(self._config.runtime.threads, os.environ),
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.msgpack.encode(Start(endpoint, flatten(self._config), os.getpid())))
            process.stdin.write_eof()
            await process.stdin.drain()
        return process

    async def _end_process(self) -> None:
        """Stop the process if it still runs, and wait for its end."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _death(self, code: int) -> Death:
        if self._fatal is not None:
            return Death(f"the engine ended: {self._fatal.error.message}", self._fatal.retry)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Death(f"the engine process {how}", True)

    # --- what it says ------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take every frame that has arrived."""
        socket = self._socket
        while socket is not None and not socket.closed:
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(decode_event(frame))
            except ProtocolError as error:
                log.error("dropped a frame of the engine: %s", error)

    def _take(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._card = event.card
            self.adapters.tell_again()
            if self._state != "stopped":
                self._set_state("ready")
                self._start_again()
        elif isinstance(event, Fatal):
            self._fatal = event
        elif isinstance(event, Loading):
            if self._on_loading is not None:
                self._on_loading(event)
        else:
            self._dispatch(event)

    def _start_again(self) -> None:
        """Give a fresh engine what its predecessor had not finished. If it ends meanwhile, that will be noticed."""
        with contextlib.suppress(EngineDead):
            for entry in self.journal:
                entry.num_attempts += 1
                self._send(Add(entry.request))

    async def _relay_stderr(self, process: asyncio.subprocess.Process) -> None:
        """Pass the engine's stderr on, and keep the last lines for the message of a failure."""
        assert process.stderr is not None
        while chunk := await process.stderr.read(1 << 16):
            text = chunk.decode(errors="replace")
            self._stderr.extend(line for line in text.splitlines() if line.strip())
            sys.stderr.write(text)
            sys.stderr.flush()


def _may_start_again(entry: JournalEntry) -> bool:
    return entry.request.pooling is not None and entry.num_attempts < MAX_ATTEMPTS


def _private_directory() -> str:
    """A fresh directory that only this user may enter, with a path short enough for a socket."""
    directory = tempfile.mkdtemp(prefix="tokenloom-")
    if len(directory) > _MAX_SOCKET_PATH and Path("/tmp").is_dir():
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="tokenloom-", dir="/tmp")
    return directory
