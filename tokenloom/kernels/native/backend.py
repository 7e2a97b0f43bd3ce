"""A program on the native kernels: built once from its records, then one call per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import LogitEdits, LogitRows, StepResult, TokenBatch, TopLogprobs, Work
from tokenloom.engine.proposer import Proposal
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.adapter_image import AdapterImage, product_numbers
from tokenloom.kernels.draft_work import DraftWork
from tokenloom.kernels.failure import StepFailed
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import PackedTable, WeightPacker
from tokenloom.kernels.program import (
    Attention,
    Cast,
    Embed,
    EmbedPositions,
    Experts,
    Gather,
    LayerNorm,
    Linear,
    Program,
    RMSNorm,
    RopeStore,
    Route,
)
from tokenloom.kernels.program_check import check_program

Float32 = NDArray[np.float32]

NUMERICS_VERSION = 1
"""Rises when the bits of any native op change."""

DTYPES = ("float32", "bfloat16")
_TABLE_TYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


class NativeBackend:
    """See `kernels.backend.Backend`.

    `weights` maps names of `program.weights` to what a `WeightPacker` made, or to plain arrays, which are packed
    here. `rope` is (cos, sin), fp32 [max_context, rotary_dim / 2]. `dtype` is the type of activations and of
    weights that are not quantised, `kv_dtype` float32, bfloat16 or int8. `isa` "" is the best that this machine
    has; the bits do not depend on it, nor on the threads. `frames_of`: a backend of which this one cuts the very
    frames, as many and as large, into pages of its own. Raises `UnsupportedFeature` and ValueError.
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
        dtype: str,
        kv_dtype: str,
        num_threads: int,
        isa: str = "",
        pool: Any = None,
        frames_of: NativeBackend | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UnsupportedFeature(f"dtype {dtype}", f"the native backend has {', '.join(DTYPES)}")
        check_program(program)
        native = extension.load()
        self._pool = pool or native.ThreadPool(num_threads)
        self._packer = WeightPacker(program, dtype, self._pool, {})
        self._native = native
        self.program = program
        self.kv_dtype = kv_dtype
        self._dtype = dtype
        self._products = product_numbers(program)
        self.num_pages = num_frames * pages_per_frame
        self.weight_sizes: dict[str, tuple[str, int]] = {}
        """(format, bytes) of each packed weight."""
        self._weights = weights
        self._model: Any = native.Model(self._pool, isa, dtype)
        self._draft_loop = native.DraftLoop()
        if frames_of is not None and frames_of._model is None:
            raise ValueError("the executor whose frames are to be shared is closed")
        kv = program.kv
        self._model.kv(
            kv_dtype, kv.num_layers, kv.num_kv_heads, kv.head_dim, num_frames, frame_bytes, pages_per_frame,
            None if frames_of is None else frames_of._model,
        )  # fmt: skip
        self._kv_dtypes: set[str] = set() if frames_of is None else frames_of._kv_dtypes
        self._kv_dtypes.add(kv_dtype)
        self._model.rope(
            *(np.ascontiguousarray(table, np.float32) for table in rope), program.num_rope_tables
        )
        self._buffers = {
            spec.name: self._model.buffer(spec.width, spec.dtype == "activation") for spec in program.buffers
        }
        formats = self._build()
        self._width = next(spec.width for spec in program.buffers if spec.name == program.head.source)
        self._numerics_id = f"native-{NUMERICS_VERSION}-{dtype}-{'+'.join(formats)}-{kv_dtype}"
        # The model holds what it needs.
        self._weights = {}

    @property
    def numerics_id(self) -> str:
        """Version of the specification, and the formats of activations, weights and KV."""
        return self._numerics_id

    def run(self, batch: TokenBatch) -> StepResult:
        """Compute a step."""
        if self._model is None:
            raise ValueError("the executor is closed")
        if (batch.work == Work.TRAIN).any():
            raise UnsupportedFeature("training rows", "the native backend has no backward pass")
        entries = batch.logit_rows
        count = len(entries)
        wanted = np.maximum(entries.num_logprobs, 0)
        ends = np.cumsum(wanted)
        room = int(ends[-1]) if count else 0
        tokens, logprobs, ranks = (
            np.zeros(count, np.int32),
            np.zeros(count, np.float32),
            np.zeros(count, np.int32),
        )
        top_ids, top_logprobs = np.zeros(room, np.int32), np.zeros(room, np.float32)
        hidden = np.zeros((len(batch.hidden_rows), self._width), np.float32)
        try:
            self._model.step(
                _batch_arrays(self._native, batch),
                _entry_arrays(self._native, entries),
                [_edit(entry, edit) for entry, edit in entries.edits.items()],
                self._native.Results(tokens, logprobs, ranks, top_ids, top_logprobs),
                batch.hidden_rows,
                hidden,
            )
        except MemoryError as error:
            raise StepFailed from error
        tops: dict[int, TopLogprobs] = {}
        for i in np.flatnonzero(entries.num_logprobs >= 0).tolist():
            span = slice(int(ends[i] - wanted[i]), int(ends[i]))
            tops[i] = TopLogprobs(top_ids[span], top_logprobs[span], int(ranks[i]))
        return StepResult(tokens, logprobs, tops, hidden=hidden)

    def draft(self, work: DraftWork) -> list[Proposal]:
        """See `speculation.draft_loop.draft`: the whole loop without Python. Raises as `run`."""
        if self._model is None:
            raise ValueError("the executor is closed")
        batch, entries = work.batch, work.batch.logit_rows
        if (batch.work == Work.TRAIN).any():
            raise UnsupportedFeature("training rows", "the native backend has no backward pass")
        try:
            trees = self._draft_loop.run(
                self._model,
                _batch_arrays(self._native, batch),
                _entry_arrays(self._native, entries),
                [_edit(entry, edit) for entry, edit in entries.edits.items()],
                work.depths,
                work.widths,
                np.ascontiguousarray(work.scratch),
            )
        except MemoryError as error:
            raise StepFailed from error
        return [Proposal(*tree) for tree in trees]

    def logits(self, rows: NDArray[np.int32]) -> Float32:
        """fp32 [n, vocabulary]: logits of rows of the last batch, which asked for some."""
        out = np.empty((len(rows), self.program.vocab_size), np.float32)
        self._model.logits(np.ascontiguousarray(rows, np.int32), out)
        return out

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Copy slots of the KV pool, int64 [C, 2] (source, destination), in order. Raises ValueError."""
        if self._model is None:
            raise ValueError("the executor is closed")
        self._model.move_slots(moves)

    def clear_kv_pages(self, pages: NDArray[np.int32]) -> None:
        """Zero KV pages of this model. Raises ValueError."""
        if self._model is None:
            raise ValueError("the executor is closed")
        self._model.clear_kv_pages(pages)

    def write_pages(self, pages: NDArray[np.int32], page_bytes: int, data: NDArray[np.uint8]) -> None:
        """Copy adapter pages [n, page_bytes] into the pool. Raises ValueError."""
        self._model.write_pages(pages, page_bytes, data)

    def clear_pages(self, pages: NDArray[np.int32], page_bytes: int) -> None:
        """Zero pages that go back to the pool, where what they held could be no finite keys."""
        # Halves of fp32 numbers may be any bf16; all else that adapters hold is finite as keys and values too.
        if self._dtype == "float32" and "bfloat16" in self._kv_dtypes:
            self._model.clear_pages(pages, page_bytes)

    def bind_adapter(self, slot: int, image: AdapterImage, pages: NDArray[np.int32]) -> None:
        """Rows of `slot` have this adapter from now on; `pages` hold its image. Raises ValueError."""
        layout = image.layout
        if layout.dtype != self._dtype:
            raise ValueError(f"an adapter image in {layout.dtype} for arithmetic in {self._dtype}")
        pieces = [(self._products[p.weight], p.first, p.count, p.half, p.rank) for p in layout.pieces]
        offsets = [
            np.frombuffer(raw, np.int64)
            for raw in (layout.a, layout.b, layout.embedding_a, layout.embedding_b)
        ]
        self._model.bind_adapter(
            slot, pages, layout.page_bytes, np.array(pieces, np.int64).reshape(-1, 5),
            np.array([p.scale for p in layout.pieces], np.float32), offsets[0], offsets[1],
            layout.embedding_rank, layout.embedding_scale, offsets[2], offsets[3],
        )  # fmt: skip

    def unbind_adapter(self, slot: int) -> None:
        """Forget a slot; its pages may be used for something else. Raises ValueError."""
        self._model.unbind_adapter(slot)

    def profile_ops(self, on: bool) -> None:
        """Measure the seconds of each op from now on (a clock read per op)."""
        self._model.profile(on)

    def op_seconds(self) -> list[tuple[str, float]]:
        """(kind, seconds since profiling was switched on) of each op, then of the head and of planning."""
        found: list[tuple[str, float]] = self._model.op_seconds()
        return found

    def close(self) -> None:
        """Release weights and the KV pool."""
        self._model = None

    # --- building ----------------------------------------------------------------------------------------

    def _build(self) -> list[str]:
        """Hand the records to the model; returns the formats of its packed weights."""
        specs = {spec.name: spec for spec in self.program.weights}
        missing = [n for n, spec in specs.items() if n not in self._weights and not spec.optional]
        if missing:
            raise ValueError(f"weights {missing} are missing")
        packed = {name: self._packed(specs[name]) for name in specs if name in self._weights}
        for spec in specs.values():
            if spec.offset:
                packed[spec.name] = packed[spec.name] + np.float32(spec.offset)
        for op in self.program.ops:
            if isinstance(op, Embed):
                self._embed(op, packed[op.weight])
            elif isinstance(op, EmbedPositions):
                self._model.embed_positions(packed[op.weight], op.offset, self._buffers[op.out])
            elif isinstance(op, Cast):
                add = -1 if op.add is None else self._buffers[op.add]
                self._model.cast(self._buffers[op.source], add, self._buffers[op.out])
            elif isinstance(op, LayerNorm):
                bias = None if op.bias is None else packed[op.bias]
                self._model.layer_norm(
                    self._buffers[op.source], packed[op.weight], bias, self._buffers[op.out], op.epsilon
                )
            elif isinstance(op, RMSNorm):
                add = -1 if op.add is None else self._buffers[op.add]
                self._model.rms_norm(
                    self._buffers[op.source], add, packed[op.weight], self._buffers[op.out], op.epsilon
                )
            elif isinstance(op, Linear):
                self._linear(op, packed)
            elif isinstance(op, Gather):
                self._model.gather(self._buffers[op.source], packed[op.order], self._buffers[op.out])
            elif isinstance(op, RopeStore):
                q_norm, k_norm = (None if n is None else packed[n] for n in (op.q_norm, op.k_norm))
                self._model.rope_store(
                    self._buffers[op.source], self._buffers[op.out], op.layer, op.num_heads, op.rotary_dim,
                    q_norm, k_norm, op.epsilon, op.table,
                )  # fmt: skip
            elif isinstance(op, Route):
                self._model.route(self._buffers[op.source], self._buffers[op.out], op.top_k, op.normalized)
            elif isinstance(op, Experts):
                self._model.experts(
                    self._buffers[op.source], self._buffers[op.routes], self._buffers[op.out],
                    [packed[name] for name in op.gate_up], [packed[name] for name in op.down], op.epilogue,
                )  # fmt: skip
            else:
                self._attention(op)
        head = self.program.head
        self._model.head(self._buffers[head.source], packed[head.weight], head.softcap or 0.0, head.divisor)
        self._model.finish()
        self.weight_sizes = {
            name: (weight.format, weight.nbytes)
            for name, weight in packed.items()
            if isinstance(weight, self._native.PackedWeight)
        }
        return sorted({name for name, _ in self.weight_sizes.values()})

    def _packed(self, spec: Any) -> Any:
        weight = self._weights[spec.name]
        if isinstance(weight, (self._native.PackedWeight, PackedTable)):
            return weight
        if weight.shape != spec.shape:
            raise ValueError(
                f"weight {spec.name} has shape {weight.shape}, but the program needs {spec.shape}"
            )
        return self._packer.pack(spec, [weight])

    def _embed(self, op: Embed, weight: Any) -> None:
        if isinstance(weight, PackedTable):
            values = weight.values
            raw = values.view(np.uint16) if values.dtype.itemsize == 2 else values
            self._model.embed_table(raw, _TABLE_TYPES[values.dtype], self._buffers[op.out], op.scale)
        else:
            self._model.embed(weight, self._buffers[op.out], op.scale)

    def _linear(self, op: Linear, packed: Mapping[str, Any]) -> None:
        bias = None if op.bias is None else packed.get(op.bias)
        self._model.linear(
            self._buffers[op.source],
            packed[op.weight],
            self._buffers[op.out],
            bias,
            op.epilogue,
            op.scale,
        )

    def _attention(self, op: Attention) -> None:
        self._model.attention(
            self._buffers[op.source],
            self._buffers[op.out],
            op.layer,
            op.num_heads,
            op.scale,
            op.window or 0,
            op.softcap or 0.0,
        )


def _batch_arrays(native: Any, batch: TokenBatch) -> Any:
    return native.BatchArrays(
        batch.token_ids, batch.positions, batch.logical, batch.slots, batch.parents, batch.starts,
        np.ascontiguousarray(batch.page_tables), batch.adapter_slots, np.ascontiguousarray(batch.page_copies),
    )  # fmt: skip


def _entry_arrays(native: Any, entries: LogitRows) -> Any:
    return native.EntryArrays(
        entries.rows, entries.targets, entries.temperatures, entries.top_k, entries.top_p, entries.min_p,
        entries.seeds, entries.sample_index, entries.positions, entries.num_logprobs,
    )  # fmt: skip


def _edit(entry: int, edit: LogitEdits) -> tuple[Any, ...]:
    return (
        entry, edit.allowed_ids, edit.seen_ids, edit.output_counts, edit.repetition_penalty,
        edit.frequency_penalty, edit.presence_penalty, edit.bias_ids, edit.bias,
    )  # fmt: skip
