"""A tokenizer of single bytes, and engines on the simulated executor that read and write it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tokenloom.clock import VirtualClock
from tokenloom.config import Config
from tokenloom.engine.batch import StepResult, Ticket
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.request import Request, SequenceDelta
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.runtime.simulated import SimulatedExecutor
from tokenloom.serving.assembly import EngineParts
from tokenloom.serving.client import ModelCard
from tokenloom.serving.requests import SeedSource
from tokenloom.text.output_text import make_stop_checker
from tokenloom.text.tokenizer import Tokenizer

BOS, EOS, VOCAB = 256, 257, 258
POISON = 255
"""A token that the executors here refuse to compute."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    """A byte-level BPE without merges: token i < 256 is one byte; returns the directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    vocab.update({"<s>": BOS, "</s>": EOS})
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_tiny_model(directory: Path) -> Path:
    """A random Llama of two layers with that tokenizer; returns the directory."""
    config = {
        **TINY,
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "max_position_embeddings": 256,
    }
    generation = {
        "eos_token_id": EOS,
        "temperature": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.0,
    }
    write_model(write_tokenizer(directory), config, llama_tensors(config), generation=generation)
    return directory


class SlowExecutor(SimulatedExecutor):
    """Takes `step_seconds` of real time for a step, and raises at the token `POISON`."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        super().__init__(VirtualClock(), vocab_size=POISON)
        self.step_seconds = step_seconds
        self.closed = False

    def collect(self, ticket: Ticket) -> StepResult:
        if POISON in ticket.batch.token_ids:
            raise RuntimeError("poisoned step")
        if self.step_seconds:
            time.sleep(self.step_seconds)
        return super().collect(ticket)

    def close(self) -> None:
        self.closed = True


def simulated_parts(
    directory: Path,
    *,
    step_seconds: float = 0.0,
    max_running: int = 32,
    max_waiting: int = 64,
    num_pages: int = 512,
    seed: int = -1,
) -> EngineParts:
    """An engine whose tokens are a hash of (seed, sample, position), below 255."""
    executor = SlowExecutor(step_seconds)
    tokenizer = Tokenizer.from_dir(directory)
    engine = Engine(
        executor,
        EngineLimits(
            vocab_size=VOCAB,
            max_context=512,
            num_pages=num_pages,
            max_running=max_running,
            max_waiting=max_waiting,
            eos_token_ids=(EOS,),
        ),
        clock=executor.clock,
        stop_checkers=make_stop_checker(tokenizer),
    )
    card = ModelCard(
        name="simulated",
        created=1,
        max_context=512,
        vocab_size=VOCAB,
        max_running=max_running,
        max_requests=max_running + max_waiting,
    )
    return EngineParts(engine=engine, tokenizer=tokenizer, card=card, seeds=SeedSource(seed))


def parts_of(config: Config, step_seconds: float) -> EngineParts:
    """The engine that a process started with `config` serves."""
    return simulated_parts(
        Path(config.model.model),
        step_seconds=step_seconds,
        max_running=config.scheduler.max_running,
        max_waiting=config.scheduler.max_waiting,
        seed=config.runtime.seed,
    )


def request(name: str, prompt: Iterable[int] = (1, 2, 4), *, seed: int = 0, **options: Any) -> Request:
    """A request of 8 tokens with a fixed seed; `options` go to SamplingParams."""
    options.setdefault("max_tokens", 8)
    return Request(
        request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(seed=seed, **options)
    )


def alone(directory: Path, wanted: Request) -> dict[int, list[int]]:
    """Tokens by sample that a request gets from an engine of its own."""
    engine = simulated_parts(directory).engine
    engine.add_request(wanted)
    tokens: dict[int, list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault(delta.sample, []).extend(delta.token_ids)
    return tokens


async def collect(deltas: AsyncIterator[SequenceDelta]) -> dict[int, list[int]]:
    """Tokens by sample of a whole stream; its last delta must be the last."""
    tokens: dict[int, list[int]] = {}
    last = False
    async for delta in deltas:
        assert not last
        tokens.setdefault(delta.sample, []).extend(delta.token_ids)
        last = delta.last
    assert last
    return tokens
