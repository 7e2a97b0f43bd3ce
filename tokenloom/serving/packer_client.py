"""Adapters are prepared in a process of idle priority, so that they never take time from the steps of an engine.

A step is computed by threads that wait for each other, so that one that loses its processor for a moment stops all of
them; and in the process of the server, a thread that gets no processor may keep the interpreter's lock from the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tokenloom.errors import EngineDead, TokenloomError, shorten
from tokenloom.serving.adapter_packer import AdapterPacker, PreparedAdapter
from tokenloom.serving.messages import rebuild_error
from tokenloom.serving.packer_process import Packed, PackerStart, Refused, decode_line, encode_line
from tokenloom.serving.threads import thread_environment

IDLE_SECONDS: Final = 60.0
"""The process ends when nobody has asked it for so long."""

# -P: a queue.py in the current directory is not the standard library's.
PACKER_COMMAND: Final = (sys.executable, "-P", "-m", "tokenloom.serving.packer_process")

_LAST_SECONDS: Final = 1.0
"""How long a process that has closed its answers may take to end, so that its own exit code is told."""

_NICENESS: Final = 19
"""Where a system has no idle priority."""


class PackerClient:
    """Does what `packer.prepare` does, in a process of its own, which is started when it is needed.

    Any thread may use it; `command` starts the process (tests put another one there).
    """

    def __init__(
        self,
        packer: AdapterPacker,
        *,
        idle_seconds: float = IDLE_SECONDS,
        command: Sequence[str] = PACKER_COMMAND,
    ) -> None:
        self._packer = packer
        self._idle_seconds = idle_seconds
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._turn = threading.Lock()
        """Held while the process works on a directory."""
        self._starting = threading.Lock()
        """Held for moments, while the process is started or told to end."""
        self._closed = False

    @property
    def process_id(self) -> int | None:
        """The pid of the process, None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def prepare(self, directory: str | Path) -> tuple[PreparedAdapter, str | None]:
        """As `AdapterPacker.prepare`, with the same errors; also `TokenloomError` where the process dies over it,
        which changes nothing, and `EngineDead` once this is closed."""
        with self._turn:
            if self._timer is not None:
                self._timer.cancel()
            try:
                answer = self._ask(str(directory))
            finally:
                if not self._closed:
                    self._timer = threading.Timer(self._idle_seconds, self._end_if_idle)
                    self._timer.daemon = True
                    self._timer.start()
        if isinstance(answer, Refused):
            raise rebuild_error(answer.error)
        drafts = [(name, _prepared(self._packer.drafts[name], part)) for name, part in answer.drafts.items()]
        return replace(_prepared(self._packer, answer), drafts=tuple(drafts)), answer.base_model_name

    def close(self) -> None:
        """End the process; who waits for it gets an error."""
        with self._starting:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        with self._turn:
            if self._timer is not None:
                self._timer.cancel()
            self._end()

    def _ask(self, directory: str) -> Packed | Refused:
        process = self._running()
        line = b""
        try:
            if process.stdin is not None and process.stdout is not None:
                process.stdin.write(encode_line(directory))
                process.stdin.flush()
                line = process.stdout.readline()
            if line.endswith(b"\n"):
                answer: Packed | Refused = decode_line(line, Packed | Refused)
                return answer
        except (OSError, ValueError):
            pass
        except BaseException:
            self._end()
            raise
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_SECONDS)
        code = self._end()
        if self._closed:
            raise EngineDead("the server is being stopped")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise TokenloomError(
            f"the process that prepares adapters {how} at {shorten(directory, 200)}; nothing has"
            " changed, and the next adapter gets another process"
        )

    def _running(self) -> subprocess.Popen[bytes]:
        """The process; another one where there is none, or where it has died."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        with self._starting:
            if self._closed:
                raise EngineDead("the server is being stopped")
            try:
                # A group of its own: Ctrl-C on a terminal reaches the parent alone. No session of its own: Linux may
                # share processors out between sessions first, and priorities count within one only.
                self._process = process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=thread_environment(1, os.environ),
                    process_group=0,
                )
            except OSError as error:
                raise TokenloomError(
                    f"the process that prepares adapters cannot be started: {error}"
                ) from None
        _be_idle(process.pid)
        packer = self._packer
        drafts = {name: draft.target for name, draft in packer.drafts.items()}
        start = PackerStart(packer.target, str(packer.directory), packer.layouts, drafts)
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # It has died, which the next line will tell.
                process.stdin.write(encode_line(start))
                process.stdin.flush()
        return process

    def _end(self) -> int:
        """End the process if it runs. Its exit code; 0 where there is none."""
        process = self._process
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # Lines that it did not take.
                    pipe.close()
        self._process = None
        return code

    def _end_if_idle(self) -> None:
        # Somebody who has the turn sets another time.
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()


def _prepared(packer: AdapterPacker, answer: Packed) -> PreparedAdapter:
    image = packer.image_path(answer.content_id)
    return PreparedAdapter(answer.content_id, answer.rank, answer.num_bytes, answer.num_pages, image)


def _be_idle(process_id: int) -> None:
    """Let a process have what nobody else wants of the processors."""
    try:
        os.sched_setscheduler(process_id, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process_id, _NICENESS)
