"""Small random models and hand-made token batches for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, LogitEdits, LogitRows, StepResult, TokenBatch, Work
from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import PackedTable, WeightPacker
from tokenloom.kernels.program import Program
from tokenloom.models.config import ModelConfig, RopeConfig
from tokenloom.models.llama import build
from tokenloom.models.weight_sources import roundings
from tokenloom.runtime.local import LocalExecutor

MAX_CONTEXT = 1024


def small_config(**changes: Any) -> ModelConfig:
    """Odd sizes on purpose: nothing is a multiple of a vector register."""
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 24,
        "max_context": MAX_CONTEXT,
        "rms_norm_eps": 1e-5,
    }
    fields |= changes
    return ModelConfig(rope=RopeConfig(rotary_dim=fields["head_dim"]), **fields)


def rope_tables(dim: int, length: int = MAX_CONTEXT) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Plain RoPE with base 10000."""
    frequencies = (1.0 / 10000.0 ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def random_weights(program: Program, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights that make the logits vary by several units."""
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    for spec in program.weights:
        values = rng.standard_normal(spec.shape).astype(np.float32)
        weights[spec.name] = values * np.float32(0.2) + np.float32(spec.name.endswith("norm.weight"))
    return weights


@dataclass(frozen=True)
class Numerics:
    """Which kernels compute, and in which formats. `weights` "" leaves them in `dtype`."""

    kernels: str = "reference"
    dtype: str = "float32"
    kv_dtype: str = "float32"
    weights: str = ""
    isa: str = ""

    @property
    def name(self) -> str:
        parts = (self.kernels, self.weights or self.dtype, self.isa)
        kv = f"kv-{self.kv_dtype}" if self.kv_dtype != self.dtype else ""
        return "-".join(part for part in (*parts, kv) if part)


REFERENCE = [Numerics(), Numerics(dtype="bfloat16", kv_dtype="bfloat16")]
NATIVE = [
    Numerics("native"),
    Numerics("native", "bfloat16", "bfloat16"),
    Numerics("native", "bfloat16", "bfloat16", "int8"),
    Numerics("native", "bfloat16", "bfloat16", "int4"),
    Numerics("native", "bfloat16", "int8"),
]


def each_numerics(*numerics: Numerics) -> Any:
    """Parametrises a test over `numerics` (all by default); native ones are skipped where they were not built."""
    reason = extension.missing()
    return pytest.mark.parametrize(
        "numerics",
        [
            pytest.param(
                n,
                id=n.name,
                marks=pytest.mark.skipif(n.kernels == "native" and reason is not None, reason=str(reason)),
            )
            for n in numerics or (*REFERENCE, *NATIVE)
        ],
    )


def page_bytes_of(program: Program, numerics: Numerics) -> int:
    return kv_page_bytes(program.kv, numerics.kv_dtype, numerics.kernels, PAGE_SIZE)


def prepared(program: Program, weights: Mapping[str, Any], numerics: Numerics) -> Mapping[str, Any]:
    """The weights as an executor takes them: rounded and packed where the numerics say so. A `PackedTable`
    stays one."""
    if not numerics.weights:
        return weights
    packer = WeightPacker(
        program, numerics.dtype, extension.thread_pool(1), roundings(program, numerics.weights)
    )
    return {
        spec.name: weight if isinstance(weight, PackedTable) else packer.pack(spec, [weight])
        for spec in program.weights
        for weight in [weights[spec.name]]
    }


def make_executor(
    config: ModelConfig,
    numerics: Numerics | None = None,
    *,
    num_threads: int = 1,
    weights: Mapping[str, Any] | None = None,
    frame_bytes: int = 0,
) -> LocalExecutor:
    """An executor with random weights and 96 pages, of which three share a frame that has a gap."""
    numerics = numerics or Numerics()
    program = build(config)
    return LocalExecutor(
        program,
        prepared(program, random_weights(program) if weights is None else weights, numerics),
        rope_tables(config.head_dim),
        num_frames=32,
        frame_bytes=frame_bytes or 3 * -(-page_bytes_of(program, numerics) // 64) * 64 + 64,
        pages_per_frame=3,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=num_threads,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )


@dataclass
class Run:
    """Rows `start` to `end` of a text whose pages are `pages`; `unstored` of them leave their slots alone."""

    tokens: Sequence[int]
    start: int
    end: int
    pages: Sequence[int]
    unstored: int = 0


@dataclass
class Entry:
    """What to ask of one row (a row of the batch)."""

    row: int
    target: int = -1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0
    num_logprobs: int = -1
    edits: LogitEdits | None = field(default=None)


def logit_rows(entries: Sequence[Entry]) -> LogitRows:
    """The entries as flat arrays."""

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([getattr(entry, name) for entry in entries], dtype)

    return LogitRows(
        rows=column("row", np.int32),
        targets=column("target", np.int32),
        temperatures=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        seeds=column("seed", np.uint64),
        sample_index=column("sample_index", np.uint32),
        positions=column("position", np.int64),
        num_logprobs=column("num_logprobs", np.int32),
        edits={i: entry.edits for i, entry in enumerate(entries) if entry.edits is not None},
    )


def make_batch(
    runs: Sequence[Run], entries: Sequence[Entry] = (), page_copies: Sequence[tuple[int, int]] = ()
) -> TokenBatch:
    """One segment per run."""
    starts = np.cumsum([0] + [run.end - run.start for run in runs]).astype(np.int32)
    positions = np.concatenate([np.arange(run.start, run.end) for run in runs]).astype(np.int32)
    width = max(len(run.pages) for run in runs)
    tables = np.zeros((len(runs), width), np.int32)
    slots: list[int] = []
    for i, run in enumerate(runs):
        tables[i, : len(run.pages)] = run.pages
        slots += [
            -1 if p < run.start + run.unstored else run.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
            for p in range(run.start, run.end)
        ]
    batch = TokenBatch(
        token_ids=np.concatenate([run.tokens[run.start : run.end] for run in runs]).astype(np.int32),
        positions=positions,
        logical=positions,
        slots=np.array(slots, np.int64),
        parents=np.full(len(positions), -1, np.int32),
        starts=starts,
        context_lens=np.array([run.start for run in runs], np.int32),
        page_tables=tables,
        adapter_slots=np.full(len(runs), -1, np.int32),
        work=np.array([Work.DECODE if run.end - run.start == 1 else Work.PREFILL for run in runs], np.int8),
        logit_rows=logit_rows(entries),
        page_copies=np.array(page_copies, np.int32).reshape(-1, 2),
    )
    batch.check()
    return batch


def tree_batch(
    text: list[int], pages: list[int], nodes: list[tuple[int, int]], scratch: list[int], entries: list[Entry]
) -> TokenBatch:
    """A verify segment after `text[:-1]`: the root is the last token of the text, then (token, parent
    node)."""
    root = len(text) - 1
    tokens = [text[-1]] + [token for token, _ in nodes]
    parents = [-1] + [parent for _, parent in nodes]
    depths = [0]
    for _, parent in nodes:
        depths.append(depths[parent] + 1)
    logical = np.array([root + depth for depth in depths], np.int32)
    slots = [pages[root // PAGE_SIZE] * PAGE_SIZE + root % PAGE_SIZE, *scratch[: len(nodes)]]
    batch = TokenBatch(
        token_ids=np.array(tokens, np.int32),
        positions=logical,
        logical=logical,
        slots=np.array(slots, np.int64),
        parents=np.array(parents, np.int32),
        starts=np.array([0, len(tokens)], np.int32),
        context_lens=np.array([root], np.int32),
        page_tables=np.array([pages], np.int32),
        adapter_slots=np.full(1, -1, np.int32),
        work=np.array([Work.VERIFY], np.int8),
        logit_rows=logit_rows(entries),
        page_copies=np.zeros((0, 2), np.int32),
    )
    batch.check()
    return batch


def step(executor: LocalExecutor, batch: TokenBatch) -> StepResult:
    return executor.collect(executor.submit(batch))


Answer = tuple[int, bytes, int, bytes, bytes, int]


def answers(result: StepResult) -> list[Answer]:
    """Per pair of entries (a scored and a drawn one, as `ask` makes them), everything as comparable bits."""
    found: list[Answer] = []
    for i in range(0, len(result.token_ids), 2):
        tops = (result.top[i], result.top[i + 1])
        found.append(
            (
                int(result.token_ids[i + 1]),
                result.logprobs[i : i + 2].tobytes(),
                tops[0].rank,
                tops[0].token_ids.tobytes(),
                tops[0].logprobs.tobytes(),
                tops[1].rank,
            )
        )
    return found


def ask(run: Run, first_row: int, seed: int, sampling: Mapping[str, Any]) -> list[Entry]:
    """For every row of the run: score the token that follows, and draw one."""
    entries: list[Entry] = []
    for position in range(run.start, run.end):
        row = first_row + position - run.start
        following = run.tokens[(position + 1) % len(run.tokens)]
        entries.append(Entry(row, target=following, num_logprobs=4))
        entries.append(Entry(row, seed=seed, position=position + 1, num_logprobs=0, **sampling))
    return entries
