"""The executor that computes in this process, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, LogitRows, StepResult, Ticket, TokenBatch, Work
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.program import Program
from tokenloom.kernels.reference.fingerprint import fingerprint
from tokenloom.kernels.reference.interpreter import Interpreter
from tokenloom.kernels.reference.kv_pool import KVPool
from tokenloom.kernels.reference.sampler import Sampler
from tokenloom.kernels.reference.workers import Workers

Float32 = NDArray[np.float32]


class LocalExecutor:
    """Runs token batches of one model with the numpy backend.

    Owns the KV pool of `num_frames` frames. `weights` and `rope` as `Interpreter` takes them; `dtype` is one
    of its formats, `kv_dtype` float32 or bfloat16; results do not depend on `num_threads`. A step is computed
    in `submit`; `collect` hands its result out.

    A batch that names what does not exist (a page, a token, a row, an adapter) is refused by `submit` with
    ValueError or `UnsupportedFeature` before anything is written. An error while computing is raised by
    `collect`; the executor stays usable, but pages that the batch would have written are in an unknown state.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, NDArray[Any]],
        rope: tuple[Float32, Float32],
        *,
        num_frames: int,
        frame_bytes: int,
        pages_per_frame: int,
        dtype: str = "float32",
        kv_dtype: str = "float32",
        num_threads: int = 1,
    ) -> None:
        pool = KVPool(
            program.kv,
            kv_dtype,
            num_frames=num_frames,
            frame_bytes=frame_bytes,
            pages_per_frame=pages_per_frame,
        )
        self._workers = Workers(num_threads)
        interpreter = Interpreter(program, weights, rope, pool, dtype, self._workers)
        self._parts: tuple[Interpreter, Sampler] | None = (
            interpreter,
            Sampler(interpreter.head, program.head.softcap),
        )
        self._vocab_size = program.vocab_size
        self._max_context = len(rope[0])
        self._num_pages = pool.num_pages
        self._numerics_id = (
            f"reference-1-{dtype}-{kv_dtype}-{fingerprint(program, interpreter.packed_linears())}"
        )

    @property
    def numerics_id(self) -> str:
        """Names the arithmetic: equal ids mean equal bits for equal weights. It ends in a digest of what the
        machine's BLAS and numpy give on fixed inputs in the shapes of this model."""
        return self._numerics_id

    def submit(self, batch: TokenBatch) -> Ticket:
        """Compute the step."""
        interpreter, sampler = self._opened()
        self._check(batch)
        start = time.perf_counter()
        try:
            with np.errstate(all="ignore"):
                result = sampler.sample(interpreter.run(batch), batch.logit_rows)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            return Ticket(batch, error)
        result.seconds = time.perf_counter() - start
        return Ticket(batch, result)

    def collect(self, ticket: Ticket) -> StepResult:
        """The result of a submitted step."""
        if isinstance(ticket.payload, StepResult):
            return ticket.payload
        if isinstance(ticket.payload, Exception):
            raise ticket.payload
        raise ValueError("the ticket is not one of this executor's")

    def close(self) -> None:
        """Release weights and the KV pool. A later `submit` raises ValueError."""
        self._parts = None
        self._workers.close()

    def profile(self, rows: int, context: int) -> float:
        """Seconds of one step of `rows` rows of one sequence after `context` tokens, with one greedy token.

        Nothing is written: the rows have no slots, and what they read are the pages as they are.
        """
        if rows < 1 or context < 0 or rows + context > self._max_context:
            raise InvalidParameter("rows + context", rows + context, f"from 1 to {self._max_context}")
        return self.collect(self.submit(_synthetic_batch(rows, context))).seconds

    def _opened(self) -> tuple[Interpreter, Sampler]:
        if self._parts is None:
            raise ValueError("the executor is closed")
        return self._parts

    def _check(self, batch: TokenBatch) -> None:
        """What an out-of-range index would silently read or write; `TokenBatch.check` says what else is
        legal."""
        rows, entries = batch.num_rows, batch.logit_rows
        if not rows or len(batch.starts) != batch.num_segments + 1 or batch.starts[-1] != rows:
            raise ValueError(f"starts {batch.starts.tolist()} do not cover {rows} rows")
        if batch.starts[0] != 0 or (np.diff(batch.starts) < 1).any():
            raise ValueError(f"starts {batch.starts.tolist()} do not rise from 0")
        for name in ("positions", "logical", "slots", "parents"):
            if len(getattr(batch, name)) != rows:
                raise ValueError(f"{name} has {len(getattr(batch, name))} entries for {rows} rows")
        if batch.page_tables.ndim != 2 or len(batch.page_tables) != batch.num_segments:
            raise ValueError(
                f"page_tables has shape {batch.page_tables.shape} for {batch.num_segments} segments"
            )
        _within("token_ids", batch.token_ids, 0, self._vocab_size)
        _within("positions", batch.positions, 0, self._max_context)
        _within("logical", batch.logical, 0, batch.page_tables.shape[1] * PAGE_SIZE)
        _within("slots", batch.slots, -1, self._num_pages * PAGE_SIZE)
        _within("page_tables", batch.page_tables, 0, self._num_pages)
        _within("page_copies", batch.page_copies, 0, self._num_pages)
        _within("parents", batch.parents - np.arange(rows), -rows - 1, 0)
        _within("logit_rows.rows", entries.rows, 0, rows)
        _within("logit_rows.targets", entries.targets, -1, self._vocab_size)
        if (batch.adapter_slots >= 0).any():
            raise UnsupportedFeature("an adapter slot", "the reference backend runs the base model only")
        if (batch.work == Work.TRAIN).any():
            raise UnsupportedFeature("training rows", "the reference backend has no backward pass")


def _within(name: str, values: NDArray[Any], low: int, high: int) -> None:
    if values.size and (values.min() < low or values.max() >= high):
        raise ValueError(f"{name} has values from {values.min()} to {values.max()}, outside [{low}, {high})")


def _synthetic_batch(rows: int, context: int) -> TokenBatch:
    positions = np.arange(context, context + rows, dtype=np.int32)
    return TokenBatch(
        token_ids=np.zeros(rows, np.int32),
        positions=positions,
        logical=positions,
        slots=np.full(rows, -1, np.int64),
        parents=np.full(rows, -1, np.int32),
        starts=np.array([0, rows], np.int32),
        context_lens=np.array([context], np.int32),
        page_tables=np.zeros((1, (context + rows) // PAGE_SIZE + 1), np.int32),
        adapter_slots=np.full(1, -1, np.int32),
        work=np.array([Work.PREFILL], np.int8),
        logit_rows=LogitRows(
            rows=np.array([rows - 1], np.int32),
            targets=np.full(1, -1, np.int32),
            temperatures=np.zeros(1, np.float32),
            top_k=np.zeros(1, np.int32),
            top_p=np.ones(1, np.float32),
            min_p=np.zeros(1, np.float32),
            seeds=np.zeros(1, np.uint64),
            sample_index=np.zeros(1, np.uint32),
            positions=np.array([context + rows], np.int64),
            num_logprobs=np.full(1, -1, np.int32),
        ),
        page_copies=np.zeros((0, 2), np.int32),
    )
