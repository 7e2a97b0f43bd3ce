"""A server on a real socket over an engine whose every token is known in advance."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers

from tokenloom.api.app import create_app
from tokenloom.clock import VirtualClock
from tokenloom.config import Config, make_config
from tokenloom.engine.batch import StepResult, Ticket, TokenBatch, TopLogprobs
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.runtime.simulated import CostModel, SimulatedExecutor
from tokenloom.serving.adapter_service import AdapterService
from tokenloom.serving.assembly import build_engine
from tokenloom.serving.client import EngineClient, ModelCard
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.local_client import ThreadEngineClient
from tokenloom.text.output_text import make_stop_checker
from tokenloom.text.tokenizer import Tokenizer

MODEL = "scripted"
BOS, EOS, VOCAB = 256, 257, 258
POISON = 255
"""A token that the executor here refuses to compute."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_CONTEXT = 512
SECONDS = 20.0
ENDING_SEED = 13
"""Requests with this seed end by themselves where the position is a multiple of 32."""

TEXT = "The café was warm. Ünder the old 🌳 tree, a dog and a red ball; STOP here, please — naïve 東京! "
SCRIPT = [*TEXT.encode()]


def token_at(position: int, sample: int = 0) -> int:
    """The script's token for an absolute position."""
    return int(SCRIPT[(position + 7 * sample) % len(SCRIPT)])


def text_at(start: int, count: int, sample: int = 0) -> str:
    """What `count` tokens from position `start` spell."""
    data = bytes(SCRIPT[(start + i + 7 * sample) % len(SCRIPT)] for i in range(count))
    return data.decode("utf-8", "replace")


def write_tokenizer(directory: Path) -> Path:
    """A tokenizer whose tokens are bytes (token i is byte i), with a chat template; returns the directory."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    vocab = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={**vocab, "<s>": BOS, "</s>": EOS}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class ScriptExecutor(SimulatedExecutor):
    """Says `TEXT` round and round, by position. Top logprobs are -1, -2, ... of the token and its followers.

    `step_seconds` is the real time of a step; the token `POISON` in a batch, or `poisoned`,
    makes it raise; it waits while `release` is cleared.
    """

    def __init__(self, step_seconds: float = 0.0) -> None:
        super().__init__(VirtualClock(), CostModel(), VOCAB, self._script)
        self.step_seconds = step_seconds
        self.poisoned = False
        self.release = threading.Event()
        self.release.set()

    @staticmethod
    def _script(batch: TokenBatch) -> np.ndarray:
        rows = batch.logit_rows
        tokens = [token_at(int(p), int(s)) for p, s in zip(rows.positions, rows.sample_index, strict=True)]
        for i, (seed, position) in enumerate(zip(rows.seeds, rows.positions, strict=True)):
            if int(seed) == ENDING_SEED and int(position) % 32 == 0:
                tokens[i] = EOS
        return np.array(tokens, np.int32)

    def collect(self, ticket: Ticket) -> StepResult:
        if self.poisoned or POISON in ticket.batch.token_ids:
            raise RuntimeError("poisoned step")
        self.release.wait(SECONDS)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        result = super().collect(ticket)
        wanted = ticket.batch.logit_rows.num_logprobs
        for i in result.top:
            count = int(wanted[i])
            ids = (np.arange(count) + result.token_ids[i]) % 256
            result.top[i] = TopLogprobs(ids.astype(np.int32), -1.0 - np.arange(count, dtype=np.float32), 1)  # type: ignore[index]
        return result


def scripted_client(directory: Path, **options: Any) -> ThreadEngineClient:
    """An engine in a thread on a `ScriptExecutor`; the options are those of the limits and the executor."""
    executor = ScriptExecutor(options.pop("step_seconds", 0.0))
    tokenizer = Tokenizer.from_dir(directory)
    max_running = options.pop("max_running", 32)
    max_waiting = options.pop("max_waiting", 64)
    engine = Engine(
        executor,
        EngineLimits(
            vocab_size=VOCAB,
            max_context=MAX_CONTEXT,
            num_pages=options.pop("num_pages", 1024),
            max_running=max_running,
            max_waiting=max_waiting,
            eos_token_ids=(EOS,),
            debug=True,
        ),
        budget=ChunkedPrefill(max_batch_tokens=256),
        clock=executor.clock,
        stop_checkers=make_stop_checker(tokenizer),
    )
    card = ModelCard(
        name=MODEL,
        created=1_700_000_000,
        max_context=MAX_CONTEXT,
        vocab_size=VOCAB,
        max_running=max_running,
        max_requests=options.pop("max_requests", max_running + max_waiting),
        numerics_id="numpy-1",
        **options,
    )
    return ThreadEngineClient(engine, tokenizer, card)


class Server:
    """A uvicorn on a free loopback port, in a thread with its own event loop."""

    def __init__(self, client: EngineClient, config: Config, adapters: AdapterService | None = None) -> None:
        self.client = client
        self.app = create_app(client, config, adapters)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        options = uvicorn.Config(self.app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        assert isinstance(self.client, ThreadEngineClient)
        return self.client._engine

    @property
    def executor(self) -> ScriptExecutor:
        assert isinstance(self.engine.executor, ScriptExecutor)
        return self.engine.executor

    def __enter__(self) -> Server:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def is_idle(self) -> bool:
        """Nothing is in flight and every page is free or idle in the prefix cache."""
        cache = self.engine.scheduler.cache
        return not self.engine.has_work and not self.client.num_in_flight and not cache.references

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        """POST JSON, or raw bytes with `content=`."""
        if "content" not in options:
            options["json"] = body
        return httpx.post(self.url + path, timeout=SECONDS, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET a path."""
        return httpx.get(self.url + path, timeout=SECONDS, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The parsed events of a stream; checks the form and that [DONE] is last, and leaves it out."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, rest = response.text.split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@contextlib.contextmanager
def serve(
    directory: Path,
    *,
    api_key: str = "",
    max_body_mb: int = 1,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A running server with a scripted engine; `settings` are further options of the configuration."""
    config = make_config({"api_key": api_key, "max_body_mb": max_body_mb, **(settings or {})}, env={})
    with Server(scripted_client(directory, **options), config) as server:
        yield server


@contextlib.contextmanager
def serve_model(directory: Path, **options: Any) -> Iterator[Server]:
    """A running server with the model in `directory`, on an engine that checks itself."""
    config = make_config({"model": str(directory), "debug": True, **options}, env={})
    parts = build_engine(config, SilentLoad())
    client = ThreadEngineClient(parts.engine, parts.tokenizer, parts.card, seeds=parts.seeds)
    with Server(client, config) as server:
        yield server


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait for `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return [*text.encode()]
