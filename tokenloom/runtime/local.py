"""The executor that computes in this process, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, StepResult, Ticket, TokenBatch
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.backend import Backend
from tokenloom.kernels.failure import StepFailed
from tokenloom.kernels.native.backend import NativeBackend
from tokenloom.kernels.program import Program
from tokenloom.kernels.reference.backend import ReferenceBackend
from tokenloom.models.memory_plan import pages_of
from tokenloom.runtime.synthetic_batches import page_writers, uniform_batch

Float32 = NDArray[np.float32]


@dataclass(slots=True)
class _Frames:
    """What executors in the same frames know of each other: how many they are, and whether pages may be in use."""

    num_executors: int = 0
    are_in_use: bool = False


class LocalExecutor:
    """Runs token batches of one model on the `kernels` "native" or "reference".

    Owns the KV pool of `num_frames` frames, whose pages are as large as `kernels.backend.kv_page_bytes` says.
    `weights` maps names of `program.weights` to arrays, or for the native kernels to what a `WeightPacker`
    made; `rope` is (cos, sin), fp32 [max_context, rotary_dim / 2]; `dtype` and `kv_dtype` are formats of the
    backend; results do not depend on `num_threads`, nor on the instruction set `isa` of the native kernels. A
    step is computed in `submit`; `collect` hands its result out.

    `frames_of` is an executor of another model on the same kernels, whose frames (as many, as large) this one cuts
    into pages of its own: memory belongs to whoever has the frame. (The reference keeps arrays of its own, whose page
    ids follow the frames.) See `Backend.clear_kv_pages`. Either may outlive the other.

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
        frames_of: LocalExecutor | None = None,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads cannot do any work")
        self._max_context = len(rope[0]) // program.num_rope_tables
        self._num_pages = num_frames * pages_per_frame
        self._vocab_size = program.vocab_size
        self._written_pages = 0
        self._frame_shape = (kernels, num_frames, frame_bytes)
        if frames_of is not None and frames_of._frame_shape != self._frame_shape:
            raise ValueError(
                f"frames of {frames_of._frame_shape} cannot be those of {self._frame_shape} "
                "(kernels, number of frames, bytes of one)"
            )
        shared = None if frames_of is None else frames_of.backend
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
                frames_of=shared if isinstance(shared, NativeBackend) else None,
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
        self._frames: _Frames = _Frames() if frames_of is None else frames_of._frames
        self._frames.num_executors += 1

    @property
    def frames(self) -> tuple[str, int, int]:
        """Kernels, number and bytes of its frames: what executors must have in common to share them."""
        return self._frame_shape

    @property
    def numerics_id(self) -> str:
        """Names the arithmetic: equal ids mean equal bits for equal weights."""
        return self.backend.numerics_id

    def submit(self, batch: TokenBatch) -> Ticket:
        """Compute the step."""
        self._frames.are_in_use = True
        return self._compute(batch)

    def collect(self, ticket: Ticket) -> StepResult:
        """The result of a submitted step."""
        if isinstance(ticket.payload, StepResult):
            return ticket.payload
        if isinstance(ticket.payload, Exception):
            raise ticket.payload
        raise ValueError("the ticket is not one of this executor's")

    def logits(self, rows: NDArray[np.int32]) -> Float32:
        """fp32 [n, vocabulary]: of at most 64 rows of the last batch that are among its logit rows."""
        return self.backend.logits(rows)

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Copy slots, int64 [C, 2] (source, destination; page * 16 + offset), one move after the other. Raises
        ValueError, before anything is copied."""
        self.backend.move_slots(moves)

    def close(self) -> None:
        """Release weights and the KV pool. A later `submit` raises ValueError."""
        self.backend.close()

    def profile(self, rows: int, context: int) -> float:
        """Seconds of one step of `rows` rows of one sequence after `context` tokens, with one greedy token.

        The step stores and reads the first pages of the pool, after every one of them has been written to.
        Hence it belongs before the first `submit` of all executors in these frames: afterwards pages may be in use,
        and it raises ValueError.
        """
        if self._frames.are_in_use:
            raise ValueError("pages may be in use: a step can be profiled only before the first one")
        limit = min(self._max_context, self._num_pages * PAGE_SIZE)
        if rows < 1 or context < 0 or rows + context > limit:
            raise InvalidParameter("rows + context", rows + context, f"from 1 to {limit}")
        needed = pages_of(rows + context)
        if needed > self._written_pages:
            for writer in page_writers(needed, self._vocab_size):
                self.collect(self._compute(writer))
            self._written_pages = needed
        seconds = self.collect(self._compute(uniform_batch(1, rows, context, self._vocab_size))).seconds
        if self._frames.num_executors > 1:
            self.backend.clear_kv_pages(np.arange(self._written_pages, dtype=np.int32))
        return seconds

    def _compute(self, batch: TokenBatch) -> Ticket:
        start = time.perf_counter()
        try:
            result = self.backend.run(batch)
        except StepFailed as failure:
            return Ticket(batch, failure.__cause__)
        result.seconds = time.perf_counter() - start
        return Ticket(batch, result)
