"""Features as data: what each changes in the engine or in its requests, and the plain run to compare with."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.kernels.harness import Numerics, page_bytes_of, prepared
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.policies.admission import AdmissionPolicy
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.queue_order import QueueOrder
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Request, TokenLogprobs
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.kernels.adapter_image import image_dtype, make_image
from tokenloom.models.config import ModelConfig, RopeConfig
from tokenloom.models.llama import build
from tokenloom.models.rope import rope_tables
from tokenloom.runtime.adapter_host import AdapterFormat, AdapterHost
from tokenloom.runtime.local import LocalExecutor

CONFIG = ModelConfig(
    family="llama",
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_context=320,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=12),
)
EOS = 7
Outputs = dict[tuple[str, int], tuple[list[int], list[TokenLogprobs], Any, Any, Any, bytes | None]]


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for spec in build(CONFIG).weights:
        scale = 1.0 if len(spec.shape) == 1 else 2.5 / np.sqrt(spec.shape[-1])
        weights[spec.name] = (rng.standard_normal(spec.shape) * scale).astype(np.float32)
    return weights


WEIGHTS = random_weights()
ROPE = rope_tables(CONFIG, CONFIG.max_context)


@dataclass
class Setup:
    """How the engine of a run is built and driven."""

    num_pages: int = 400
    max_running: int = 64
    max_batch_tokens: int = 512
    max_chunk_tokens: int = 0
    prefix_cache: bool = False
    order: QueueOrder = field(default_factory=QueueOrder)
    numerics: Numerics = field(default_factory=Numerics)
    during: Callable[[Engine, int], None] | None = None
    admission: AdmissionPolicy = "optimistic"
    texts: Mapping[tuple[str, int], list[int]] | None = None
    """What each sample will say, where speculation is on: trees hold some of it."""


class SomeTrees:
    """Trees of any shape: of `texts`, of those that go on elsewhere, and of tokens at random."""

    name = "some"

    def __init__(self, texts: Mapping[tuple[str, int], list[int]], seed: int) -> None:
        self._texts = texts
        self._rng = random.Random(seed)

    def propose(self, wanted: Any) -> list[Proposal]:
        return [self._tree(want) for want in wanted]

    def _tree(self, want: Wanted) -> Proposal:
        rng = self._rng
        seq = want.seq
        ahead = self._texts.get((seq.request.request_id, seq.index), [])[seq.num_output :]
        tree = Proposal()
        right: dict[int, int] = {-1: 0}
        taken: dict[int, set[int]] = {-1: set()}
        for node in range(rng.randrange(want.max_nodes + 1)):
            # Deep ones are chosen most of the time, so that paths of some length come about.
            parent = max(rng.choice(list(taken)) for _ in range(3))
            depth = right.get(parent, len(ahead))
            hit = depth < len(ahead) and rng.random() < 0.6 and ahead[depth] not in taken[parent]
            token = ahead[depth] if hit else rng.randrange(CONFIG.vocab_size)
            if token in taken[parent]:
                break
            if depth < len(ahead) and token == ahead[depth]:
                right[node] = depth + 1
            taken[parent].add(token)
            taken[node] = set()
            tree.tokens.append(token)
            tree.parents.append(parent)
            tree.ranks.append(len(taken[parent]) - 1)
            tree.confidences.append(rng.random())
        return tree

    def forget(self, seq: Sequence) -> None:
        pass

    def close(self) -> None:
        pass


class LetterStops:
    """A stop checker without a tokenizer: token t reads as the letter t % 26."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._text = ""
        self._count = 0

    def push(self, token_id: int) -> str | None:
        self._count += 1
        if self._count <= self._params.min_tokens:
            return None
        self._text += chr(ord("a") + token_id % 26)
        return next((stop for stop in self._params.stop if self._text.endswith(stop)), None)


@functools.cache
def _prepared(numerics: Numerics) -> Mapping[str, Any]:
    return prepared(build(CONFIG), WEIGHTS, numerics)


FRAME_BYTES = 64 << 10
ADAPTER_PAGE_BYTES = 8 << 10
ADAPTERS = ("a", "b")


@dataclass(frozen=True)
class Block:
    weight: str
    begin: int
    end: int
    a: np.ndarray
    b: np.ndarray
    scale: float


def adapter_blocks(seed: int) -> list[Block]:
    """Updates of every product, at ranks from 1 to 4."""
    rng = np.random.default_rng(seed)
    program = build(CONFIG)
    shapes = {spec.name: spec.shape for spec in program.weights}
    blocks = []
    for i, (name, _) in enumerate(program.products()):
        (outputs, inputs), rank = shapes[name], 1 + (i + seed) % 4
        a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
        blocks.append(Block(name, 0, outputs, 0.5 * a, 0.1 * b, 0.7))
    return blocks


@functools.cache
def _images(dtype: str) -> Path:
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    for i, name in enumerate(ADAPTERS):
        blocks = adapter_blocks(i)
        image = make_image(build(CONFIG), blocks, None, dtype, page_bytes=ADAPTER_PAGE_BYTES)
        image.save(Path(folder.name, name))
    return Path(folder.name)


_kept: list[Any] = []


def make_engine(setup: Setup) -> Engine:
    program = build(CONFIG)
    numerics = setup.numerics
    # The tiny pool has three frames in every format.
    pages_per_frame = min(7, FRAME_BYTES // page_bytes_of(program, numerics))
    executor = LocalExecutor(
        program,
        _prepared(numerics),
        ROPE,
        num_frames=-(-setup.num_pages // pages_per_frame),
        frame_bytes=FRAME_BYTES,
        pages_per_frame=pages_per_frame,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=1 if numerics.kernels == "reference" else 2,
        kernels=numerics.kernels,
    )
    limits = EngineLimits(
        vocab_size=CONFIG.vocab_size,
        max_context=CONFIG.max_context,
        num_pages=setup.num_pages,
        pages_per_frame=pages_per_frame,
        adapter_pages_per_frame=FRAME_BYTES // ADAPTER_PAGE_BYTES,
        adapter_page_bytes=ADAPTER_PAGE_BYTES,
        admission=setup.admission,
        max_running=setup.max_running,
        eos_token_ids=(EOS,),
        prefix_cache=setup.prefix_cache,
        debug=True,
    )
    host = AdapterHost(executor.backend, AdapterFormat(image_dtype(numerics.dtype), ADAPTER_PAGE_BYTES))
    for name in ADAPTERS:
        host.add(name, _images(host.format.dtype) / name)
    budget = ChunkedPrefill(setup.max_batch_tokens, setup.max_chunk_tokens)
    engine = Engine(
        executor,
        limits,
        budget=budget,
        order=setup.order,
        stop_checkers=lambda prompt, params: LetterStops(params),
        adapters=host,
    )
    if setup.texts is not None:
        proposers = [SomeTrees(setup.texts, seed) for seed in range(2)]
        engine.speculate(Speculator(proposers, SpeculationLimits(max_nodes=24, max_rows=200, pace="fixed")))
    return engine


def serve(setup: Setup, requests: list[Request]) -> Outputs:
    """Everything each sample got: tokens, logprobs, finish reason, stop, prompt logprobs, embedding."""
    engine = make_engine(setup)
    for request in requests:
        engine.add_request(request)
    outputs: Outputs = {}
    for step in range(20_000):
        if not engine.has_work:
            break
        if setup.during is not None:
            setup.during(engine, step)
        for delta in engine.step():
            tokens, logprobs, _, _, scored, _ = outputs.get(
                (delta.request_id, delta.sample), ([], [], None, None, None, None)
            )
            outputs[delta.request_id, delta.sample] = (
                tokens + delta.token_ids,
                logprobs + delta.logprobs,
                delta.finish_reason,
                delta.stop,
                scored if delta.prompt_logprobs is None else delta.prompt_logprobs,
                delta.embedding,
            )
    assert not engine.has_work
    assert not engine.scheduler.cache.references
    engine.close()
    return {key: value for key, value in outputs.items() if not key[0].startswith("extra")}


def base_requests(seed: int, count: int = 5) -> list[Request]:
    """Prompts that share prefixes in part, of lengths around page and split borders."""
    rng = random.Random(seed)
    common = [rng.randrange(CONFIG.vocab_size) for _ in range(140)]
    requests = []
    for i in range(count):
        prompt = common[: rng.choice([0, 16, 33, 128, 140])]
        prompt = prompt + [rng.randrange(CONFIG.vocab_size) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(temperature=0.0, seed=i, max_tokens=rng.randrange(4, 20), logprobs=2)
        requests.append(Request(request_id=f"r{i}", prompt_token_ids=prompt, params=params))
    return requests
