"""llama.cpp: its HTTP server with continuous batching and per-slot prefix cache, fed with token ids.

The server is what its users run; it also detokenises, which the other engines are spared here.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time
from typing import Any

from workloads import Request

from backends import Engine

PARALLEL = 32
CONTEXT = 49_152
"""Tokens of the unified cache that all slots share."""
UBATCH = 512


class Backend:
    """A llama-server of our own on a free port. `options["server"]` is the program; `parallel`, `context` and more
    arguments (`extra`) may be there too."""

    def __init__(self, engine: Engine) -> None:
        self._server = str(engine.options["server"])
        self._port = free_port()
        threads = str(engine.threads)
        command = [self._server, "-m", engine.model, "-t", threads, "-tb", threads]
        parallel = str(engine.options.get("parallel", PARALLEL))
        context = str(engine.options.get("context", CONTEXT))
        command += ["-np", parallel, "-c", context, "-kvu", "-b", "2048", "-ub", str(UBATCH)]
        command += ["-fa", "auto", "--host", "127.0.0.1", "--port", str(self._port), "--no-webui", "-lv", "1"]
        command += [str(option) for option in engine.options.get("extra", [])]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not self._healthy():
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._process.returncode}")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _complete(self, request: Request) -> list[int]:
        body = {
            "prompt": request.prompt,
            "n_predict": request.num_output,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": True,
            "return_tokens": True,
            "stream": False,
        }
        return [int(token) for token in self.complete(body)["tokens"]]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """What `/completion` answers. Raises RuntimeError for any other status than 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=3600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {str(answer)[:300]}")
        return answer

    def generate(self, requests: list[Request]) -> list[list[int]]:
        outputs: list[list[int] | Exception] = [[] for _ in requests]

        def serve(index: int) -> None:
            try:
                outputs[index] = self._complete(requests[index])
            except Exception as error:  # carried over to the caller's thread
                outputs[index] = error

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return [output for output in outputs if not isinstance(output, Exception)]

    def versions(self) -> dict[str, str]:
        shown = subprocess.run([self._server, "--version"], capture_output=True, text=True, check=False)
        # What follows in brackets is a commit of whatever git directory lies above the build, not its own.
        found = re.search(r"version:\s*([^\s(]+)", shown.stderr + shown.stdout)
        return {"llama.cpp": found[1] if found else "unknown"}

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port that is free now; the server has no way to choose one and tell us."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(os.environ.get("LLAMACPP_PORT", "0"))))
        return int(probe.getsockname()[1])
