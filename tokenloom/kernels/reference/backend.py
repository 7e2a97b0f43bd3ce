"""A program on the numpy reference: interpreter, KV pool and sampler together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, StepResult, TokenBatch, Work
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.adapter_image import AdapterImage
from tokenloom.kernels.failure import StepFailed
from tokenloom.kernels.program import Program
from tokenloom.kernels.reference.fingerprint import fingerprint
from tokenloom.kernels.reference.interpreter import Interpreter
from tokenloom.kernels.reference.kv_pool import KVPool
from tokenloom.kernels.reference.sampler import Sampler
from tokenloom.kernels.reference.workers import Workers

Float32 = NDArray[np.float32]


class ReferenceBackend:
    """See `kernels.backend.Backend`. `weights` and `rope` as `Interpreter` takes them; `dtype` is one of its
    formats, `kv_dtype` float32 or bfloat16; results do not depend on `num_threads`."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, NDArray[Any]],
        rope: tuple[Float32, Float32],
        *,
        num_frames: int,
        frame_bytes: int,
        pages_per_frame: int,
        dtype: str,
        kv_dtype: str,
        num_threads: int,
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
            Sampler(interpreter.head, program.head.softcap, program.head.divisor, self._update_head),
        )
        self._vocab_size = program.vocab_size
        self._max_context = len(rope[0])
        self._pool = pool
        self._num_pages = pool.num_pages
        self._hidden = np.zeros((0, 0), np.float32)
        self._slots = np.zeros(0, np.int32)
        self._head = program.head.weight
        self._numerics_id = (
            f"reference-1-{dtype}-{kv_dtype}-{fingerprint(program, interpreter.packed_linears())}"
        )

    @property
    def numerics_id(self) -> str:
        """Ends in a digest of what the machine's BLAS and numpy give on fixed inputs in the shapes of this
        model."""
        return self._numerics_id

    def run(self, batch: TokenBatch) -> StepResult:
        """Compute a step."""
        if self._parts is None:
            raise ValueError("the executor is closed")
        interpreter, sampler = self._parts
        self._check(batch)
        try:
            with np.errstate(all="ignore"):
                self._hidden = interpreter.run(batch)
                self._slots = np.repeat(batch.adapter_slots, np.diff(batch.starts))
                result = sampler.sample(self._hidden, batch.logit_rows)
                result.hidden = self._hidden[batch.hidden_rows]
                return result
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise StepFailed from error

    def logits(self, rows: NDArray[np.int32]) -> Float32:
        """fp32 [n, vocabulary]: logits of rows of the last batch, at most 64."""
        if self._parts is None:
            raise ValueError("the executor is closed")
        return self._parts[1].logits(self._hidden, rows)

    def _update_head(self, rows: NDArray[np.integer[Any]], hidden: Float32, logits: Float32) -> None:
        if self._parts is not None and (self._slots[rows] >= 0).any():
            adapters = self._parts[0].adapters
            adapters.add_products(self._head, self._slots[rows], hidden, logits)

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Copy slots of the KV pool, int64 [C, 2] (source, destination), in order. Raises ValueError."""
        if self._parts is None:
            raise ValueError("the executor is closed")
        if moves.ndim != 2 or moves.shape[1] != 2:
            raise ValueError("moves must be [C, 2]")
        _within("moves", moves, 0, self._num_pages * PAGE_SIZE)
        self._pool.move_slots(moves)

    def clear_kv_pages(self, pages: NDArray[np.int32]) -> None:
        """Zero KV pages of this model. Raises ValueError."""
        if self._parts is None:
            raise ValueError("the executor is closed")
        _within("pages", pages, 0, self._num_pages)
        self._pool.clear_pages(pages)

    def write_pages(self, pages: NDArray[np.int32], page_bytes: int, data: NDArray[np.uint8]) -> None:
        """Nothing: adapters are read from their images."""

    def clear_pages(self, pages: NDArray[np.int32], page_bytes: int) -> None:
        """Nothing, likewise."""

    def bind_adapter(self, slot: int, image: AdapterImage, pages: NDArray[np.int32]) -> None:
        """Rows of `slot` have this adapter from now on. Raises ValueError, `UnsupportedFeature`."""
        if self._parts is None:
            raise ValueError("the executor is closed")
        self._parts[0].adapters.bind(slot, image)

    def unbind_adapter(self, slot: int) -> None:
        """Forget a slot. Raises ValueError where nothing is bound."""
        if self._parts is not None:
            self._parts[0].adapters.unbind(slot)

    def close(self) -> None:
        """Release weights and the KV pool."""
        self._parts = None
        self._hidden = np.zeros((0, 0), np.float32)
        self._workers.close()

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
        _within("hidden_rows", batch.hidden_rows, 0, rows)
        if (np.diff(batch.hidden_rows) < 1).any():
            raise ValueError("hidden_rows do not rise")
        adapters = self._parts[0].adapters if self._parts is not None else ()
        if unknown := {slot for slot in batch.adapter_slots.tolist() if slot >= 0 and slot not in adapters}:
            raise ValueError(f"adapter_slots has the values {sorted(unknown)}, where no adapter is bound")
        if (batch.work == Work.TRAIN).any():
            raise UnsupportedFeature("training rows", "the reference backend has no backward pass")


def _within(name: str, values: NDArray[Any], low: int, high: int) -> None:
    if values.size and (values.min() < low or values.max() >= high):
        raise ValueError(f"{name} has values from {values.min()} to {values.max()}, outside [{low}, {high})")
