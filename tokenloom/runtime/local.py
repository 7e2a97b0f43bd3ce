"""The executor that computes in this process, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, LogitRows, StepResult, Ticket, TokenBatch, Work
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.backend import Backend
from tokenloom.kernels.failure import StepFailed
from tokenloom.kernels.native.backend import NativeBackend
from tokenloom.kernels.program import Program
from tokenloom.kernels.reference.backend import ReferenceBackend

Float32 = NDArray[np.float32]


class LocalExecutor:
    """Runs token batches of one model on the `kernels` "native" or "reference".

    Owns the KV pool of `num_frames` frames, whose pages are as large as `kernels.backend.kv_page_bytes` says.
    `weights` maps names of `program.weights` to arrays, or for the native kernels to what a `WeightPacker`
    made; `rope` is (cos, sin), fp32 [max_context, rotary_dim / 2]; `dtype` and `kv_dtype` are formats of the
    backend; results do not depend on `num_threads`, nor on the instruction set `isa` of the native kernels. A
    step is computed in `submit`; `collect` hands its result out.

    A batch that names what does not exist (a page, a token, a row, an adapter) is refused by `submit` with
    ValueError or `UnsupportedFeature` before anything is written. An error while computing is raised by
    `collect`; the executor stays usable, but pages that the batch would have written are in an unknown state.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Any],
        rope: tuple[Float32, Float32],
        *,
        num_frames: int,
        frame_bytes: int,
        pages_per_frame: int,
        dtype: str = "float32",
        kv_dtype: str = "float32",
        num_threads: int = 1,
        kernels: str = "reference",
        isa: str = "",
        pool: Any = None,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads cannot do any work")
        self._max_context = len(rope[0])
        self.backend: Backend
        if kernels == "native":
            self.backend = NativeBackend(
                program,
                weights,
                rope,
                num_frames=num_frames,
                frame_bytes=frame_bytes,
                pages_per_frame=pages_per_frame,
                dtype=dtype,
                kv_dtype=kv_dtype,
                num_threads=num_threads,
                isa=isa,
                pool=pool,
            )
        elif kernels == "reference":
            self.backend = ReferenceBackend(
                program,
                weights,
                rope,
                num_frames=num_frames,
                frame_bytes=frame_bytes,
                pages_per_frame=pages_per_frame,
                dtype=dtype,
                kv_dtype=kv_dtype,
                num_threads=num_threads,
            )
        else:
            raise UnsupportedFeature(f"kernels {kernels}", "there are native and reference")

    @property
    def numerics_id(self) -> str:
        """Names the arithmetic: equal ids mean equal bits for equal weights."""
        return self.backend.numerics_id

    def submit(self, batch: TokenBatch) -> Ticket:
        """Compute the step."""
        start = time.perf_counter()
        try:
            result = self.backend.run(batch)
        except StepFailed as failure:
            return Ticket(batch, failure.__cause__)
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
        self.backend.close()

    def profile(self, rows: int, context: int) -> float:
        """Seconds of one step of `rows` rows of one sequence after `context` tokens, with one greedy token.

        Nothing is written: the rows have no slots, and what they read are the pages as they are.
        """
        if rows < 1 or context < 0 or rows + context > self._max_context:
            raise InvalidParameter("rows + context", rows + context, f"from 1 to {self._max_context}")
        return self.collect(self.submit(_synthetic_batch(rows, context))).seconds


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
