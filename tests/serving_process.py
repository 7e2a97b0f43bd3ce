"""A `tokenloom serve` process for tests: started, waited for, interrupted."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0


class ServeProcess:
    """`tokenloom serve --port 0` with more arguments; `wait_ready` reads its output up to the curl line."""

    def __init__(self, *args: str) -> None:
        command = [
            sys.executable,
            "-c",
            "from tokenloom.cli.main import main; main()",
            "serve",
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self.url = ""
        self.curl = ""
        self._arriving: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arriving.put(line.rstrip("\n"))
        self._arriving.put(None)

    def wait_ready(self) -> None:
        """Returns when the curl line was printed; fails when the process ends or takes too long."""
        end = time.monotonic() + START_SECONDS
        while not self.curl:
            line = self._arriving.get(timeout=max(end - time.monotonic(), 0.01))
            if line is None:
                raise AssertionError("the server ended:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if match := re.match(r"ready: (http://\S+)", line):
                self.url = match[1]
            if line.startswith("curl "):
                self.curl = line

    def children(self) -> list[int]:
        """Process ids of the direct children."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []

    def stop(self, sig: signal.Signals = signal.SIGINT, seconds: float = 20.0) -> int:
        """Send `sig`; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)

    def rest(self) -> str:
        """All output so far, once the process has ended."""
        self.process.wait(START_SECONDS)
        while (line := self._arriving.get(timeout=5)) is not None:
            self.lines.append(line)
        return "\n".join(self.lines)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


@contextmanager
def serving(*args: str) -> Iterator[ServeProcess]:
    """A server that is ready, and gone afterwards."""
    server = ServeProcess(*args)
    try:
        server.wait_ready()
        yield server
    finally:
        try:
            server.stop()
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
