"""How much load one process of `tokenloom bench serve` can put on a server and still keep its times right.

    python bench/load_limits.py [--quick] [--json]

The server is a process of its own that does nothing but write canned chunks: to a request its answer, one chunk
to every open stream each tick. The generator runs as a user runs it. What it reached, how late it was and what
it used of a core is what it says of itself; "for a core" is the rate divided by that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" w",'
    b'"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":32,"completion_tokens":%d,"total_tokens":9}}'
    b"\n\n"
)
END = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


def framed(data: bytes) -> bytes:
    """As one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Stream(asyncio.Protocol):
    """A connection; `waiting` are those that get their next chunk at the next tick."""

    waiting: dict[Stream, int] = {}  # noqa: RUF012 (one server, one set of streams)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.read = b""

    def connection_lost(self, error: Exception | None) -> None:
        self.waiting.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.read += data
        head, found, body = self.read.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if found and len(body) >= int(lengths[0][15:]):
            self.read = b""
            self.transport.write(HEAD)  # type: ignore[attr-defined]
            self.waiting[self] = 0


async def serve(num_chunks: int, tick: float) -> None:
    """Print the port, then serve until killed."""
    chunks = [framed(CHUNK % (number + 1)) for number in range(num_chunks)]
    chunks[-1] += framed(END) + b"0\r\n\r\n"
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stream, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = loop.time()
    while True:
        due = max(due + tick, loop.time())
        await asyncio.sleep(due - loop.time())
        for stream, number in list(Stream.waiting.items()):
            stream.transport.write(chunks[number])  # type: ignore[attr-defined]
            if number + 1 < num_chunks:
                Stream.waiting[stream] = number + 1
            else:
                del Stream.waiting[stream]


def measure(num_chunks: int, tick: float, *options: str) -> dict[str, Any]:
    """One run of the generator against a fresh server."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(num_chunks), str(tick)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        command = [sys.executable, "-c", "from tokenloom.cli.main import main; main()", "bench", "serve"]
        command += ["--port", port, "--model", "m", "--vocab-size", "1000", "--random-input-len", "32"]
        command += ["--random-output-len", str(num_chunks), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        server.kill()
        server.wait()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(int(options.serve[0]), float(options.serve[1])))
    seconds = 3 if options.quick else 10
    results = []
    titles = ("reached", "CPU of a core", "for a core", "median lag, ms", "p99 lag, ms")
    print(f"{'offered':>24}{titles[0]:>12}{titles[1]:>15}{titles[2]:>12}{titles[3]:>16}{titles[4]:>13}")
    for rate in (250, 500, 1000, 1500):
        found = measure(4, 0.001, "--request-rate", str(rate), "--num-prompts", str(rate * seconds))
        reached = found["request_throughput"]
        results.append(("requests/s", rate, reached, found))
    for streams in (100, 200, 300, 400):
        # Started over a second; the rate counts from the first to the last chunk of most streams.
        found = measure(
            100 * seconds,
            0.01,
            "--request-rate",
            str(streams),
            "--num-prompts",
            str(streams),
            "--burstiness",
            "inf",
        )
        reached = found["total_output_tokens"] / (found["duration"] - 1)
        results.append(("chunks/s", streams * 100, reached, found))
    for unit, offered, reached, found in results:
        per_core = reached / found["generator_cpu_share"]
        lags = f"{found['median_lag_ms']:16.2f}{found['p99_lag_ms']:13.2f}"
        print(
            f"{offered:>12} {unit:<11}{reached:12,.0f}{found['generator_cpu_share']:15.0%}{per_core:12,.0f}{lags}"
        )
    if options.json:
        keys = ("generator_cpu_share", "median_lag_ms", "p99_lag_ms", "median_itl_ms", "p99_itl_ms", "failed")
        rows = [
            {"unit": unit, "offered": offered, "reached": reached, **{key: found[key] for key in keys}}
            for unit, offered, reached, found in results
        ]
        print(json.dumps({"seconds": seconds, "results": rows}))


if __name__ == "__main__":
    main()
