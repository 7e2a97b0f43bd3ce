"""The engine process: builds the engine, serves it over one socket, and never outlives its parent.

Started as `python -P -m tokenloom.serving.engine_process` with a msgpack `Start` on stdin. Exit codes: 0
stopped, 1 a step failed (worth a restart), 2 the engine cannot be built.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import zmq

from tokenloom.config import Config, make_config
from tokenloom.errors import TokenloomError
from tokenloom.serving.assembly import EngineParts, build_engine
from tokenloom.serving.load_listener import LoadListener
from tokenloom.serving.messages import (
    MAX_FRAME_BYTES,
    Command,
    ErrorBody,
    Event,
    Fatal,
    Loading,
    ProtocolError,
    Ready,
    decode_command,
    encode,
    error_body,
)
from tokenloom.serving.step_loop import StepLoop

log = logging.getLogger(__name__)

IDLE_POLL_MS: Final = 100
_PR_SET_PDEATHSIG: Final = 1
_LINGER_MS: Final = 1000


class Start(msgspec.Struct, forbid_unknown_fields=True):
    """What the supervisor writes to stdin: where to connect, the flat configuration, who the parent is."""

    endpoint: str
    config: dict[str, Any]
    parent_pid: int


class Wire:
    """The socket of the engine process. Sending never blocks: what requests may ask bounds the queue."""

    def __init__(self, endpoint: str, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(endpoint)
        self.orphaned = False

    def emit(self, event: Event) -> None:
        """Send one event."""
        self._socket.send(encode(event))

    def receive(self, block: bool) -> Iterator[Command]:
        """The commands that are there; with `block`, wait for one for at most `IDLE_POLL_MS`."""
        if os.getppid() != self._parent_pid:
            self.orphaned = True
            return
        if block and not self._socket.poll(IDLE_POLL_MS):
            return
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield decode_command(frame)
            except ProtocolError as error:
                log.error("dropped a frame: %s", error)

    def close(self) -> None:
        """Send what is queued (for a second at most) and close."""
        self._socket.close()
        self._context.term()


class WireLoad:
    """Reports loading to the supervisor; the plan goes to stderr, which the supervisor passes on."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._sent = 0.0

    def plan(self, text: str) -> None:
        """Print the plan."""
        print(text, file=sys.stderr, flush=True)

    def advance(self, stage: str, done: int, total: int) -> None:
        """Send the state of loading, at most twenty times a second."""
        now = time.monotonic()
        if done >= total or now - self._sent > 0.05:
            self._sent = now
            self._emit(Loading(stage, done, total))


def main(build: Callable[[Config, LoadListener], EngineParts] = build_engine) -> int:
    """Read `Start` from stdin, serve until told to stop; returns the exit code."""
    # Ctrl-C on a terminal reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    start = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Start)
    _die_with_parent(start.parent_pid)
    config = make_config(start.config, env={})
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(levelname)s engine: %(message)s", stream=sys.stderr
    )
    wire = Wire(start.endpoint, start.parent_pid)
    try:
        return _serve(wire, config, build)
    finally:
        wire.close()
        # The supervisor does the same, unless it is gone.
        shutil.rmtree(os.path.dirname(start.endpoint.removeprefix("ipc://")), ignore_errors=True)


def _serve(wire: Wire, config: Config, build: Callable[[Config, LoadListener], EngineParts]) -> int:
    try:
        parts = build(config, WireLoad(wire.emit))
    except TokenloomError as error:
        wire.emit(Fatal(error_body(error), retry=False))
        return 2
    except Exception as error:
        log.exception("the engine cannot be built")
        wire.emit(Fatal(error_body(error), retry=True))
        return 2
    loop = StepLoop(
        parts.engine, lambda block: _receive(wire, loop, block), wire.emit, parts.seeds, parts.adapters
    )
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(loop, "stopping", True))
    wire.emit(Ready(parts.card))
    try:
        loop.run()
    except Exception as error:
        log.exception("a step failed; the engine ends")
        wire.emit(Fatal(ErrorBody("internal", f"a step failed: {type(error).__name__}: {error}"), retry=True))
        return 1
    parts.engine.close()
    return 0


def _receive(wire: Wire, loop: StepLoop, block: bool) -> Iterator[Command]:
    yield from wire.receive(block)
    if wire.orphaned:
        loop.stopping = True


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM when the parent ends; the loop also watches the parent's pid."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
