"""Walks a program's records over a token batch.

The records are compiled once, at load, into callables that hold their weights. A `Step` holds what one batch
needs: views of the buffers, gathered RoPE rows, where K and V go, and the attention plans.

Formats. Weights and activations are fp32 in memory, because that is what the BLAS multiplies. In the dtype
bfloat16, weights of linears and of the embedding are rounded to bfloat16 values at load, and "activation"
buffers are rounded where they are written; sums, norms, residual stream and q stay fp32. float16 computes in
fp32 with the checkpoint's values, which fit exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, TokenBatch
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.program import (
    Attention,
    Cast,
    Embed,
    EmbedPositions,
    Experts,
    Gather,
    LayerNorm,
    Linear,
    Op,
    Program,
    RMSNorm,
    RopeStore,
    Route,
)
from tokenloom.kernels.program_check import check_program
from tokenloom.kernels.reference.adapters import AdapterUpdates
from tokenloom.kernels.reference.attention import AttentionPlan, HeadShape, run_attention
from tokenloom.kernels.reference.gemm import COLUMN_UNIT, ROW_TILE, PackedLinear, padded
from tokenloom.kernels.reference.kv_pool import Indices, KVPool
from tokenloom.kernels.reference.rounding import from_bfloat16_bits, round_bfloat16
from tokenloom.kernels.reference.workers import Workers
from tokenloom.kernels.spec import GELU_ERF_TERMS

Float32 = NDArray[np.float32]

DTYPES = ("float32", "bfloat16", "float16")

_BLOCK_ROWS = 128
"""Rows per block of a linear: its product should stay in the caches for the epilogue."""

_ONE = np.float32(1)


class Step:
    """One batch on its way through the program. `rows` is T, `padded_rows` T rounded up to row tiles."""

    def __init__(
        self,
        batch: TokenBatch,
        buffers: dict[str, Float32],
        tables: tuple[Float32, Float32],
        num_tables: int,
        pool: KVPool,
    ) -> None:
        self.rows = batch.num_rows
        self.padded_rows = padded(self.rows, ROW_TILE)
        self.token_ids = batch.token_ids
        self.positions = batch.positions
        self.wide = {name: buffer[: self.padded_rows] for name, buffer in buffers.items()}
        cos, sin = tables
        positions = np.zeros(self.padded_rows, np.intp)
        positions[: self.rows] = batch.positions
        length = len(cos) // num_tables
        self.turns = [
            (cos[positions + i * length][:, None], sin[positions + i * length][:, None])
            for i in range(num_tables)
        ]
        self.slots: NDArray[np.int32] | None = None
        """The adapter of each row, padding included; None where no row has one."""
        if (batch.adapter_slots >= 0).any():
            self.slots = np.full(self.padded_rows, -1, np.int32)
            self.slots[: self.rows] = np.repeat(batch.adapter_slots, np.diff(batch.starts))
        self._batch = batch
        self._pool = pool
        self._plans: dict[tuple[HeadShape, int | None], AttentionPlan] = {}
        self.written: Indices | None = None
        if batch.slots.min() < 0:
            self.written = np.flatnonzero(batch.slots >= 0)
        slots = batch.slots if self.written is None else batch.slots[self.written]
        page_ids, self.offsets = np.divmod(slots.astype(np.intp), PAGE_SIZE)
        self.frames, self.pages = pool.locate(page_ids)

    def attention_plan(self, op: Attention) -> AttentionPlan:
        """The plan for layers like `op`, made when the first of them runs."""
        key = (HeadShape.of(op), op.window)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = AttentionPlan(self._batch, key[0], op.window, self._pool)
        return plan


CompiledOp = Callable[[Step], None]


class Interpreter:
    """A program with its weights, ready to run.

    `weights` maps the names of `program.weights` to arrays of fp32, bfloat16 (ml_dtypes) or float16 in the
    spec's shape; optional ones may be absent. `rope` is (cos, sin), fp32 [tables * max_context, rotary_dim / 2].
    Raises `UnsupportedFeature` for a dtype that is none of `DTYPES`, ValueError for a weight that is missing
    or has another shape.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, NDArray[Any]],
        rope: tuple[Float32, Float32],
        pool: KVPool,
        dtype: str,
        workers: Workers,
    ) -> None:
        if dtype not in DTYPES:
            raise UnsupportedFeature(f"dtype {dtype}", f"the reference backend has {', '.join(DTYPES)}")
        check_program(program)
        self.program = program
        self._pool = pool
        self._workers = workers
        self._rope = rope
        self._rounds = dtype == "bfloat16"
        self._weights = {
            spec.name: _shifted(_checked(weights[spec.name], spec.name, spec.shape), spec.offset)
            for spec in program.weights
            if not (spec.optional and spec.name not in weights)
        }
        self.adapters = AdapterUpdates(program)
        self._packed: dict[str, PackedLinear] = {}
        self._widths = {spec.name: spec.width for spec in program.buffers}
        self._rounded = {spec.name for spec in program.buffers if self._rounds and spec.dtype == "activation"}
        self._buffers: dict[str, Float32] = {}
        self._capacity = 0
        self._ops = [self._compile(op) for op in program.ops]
        self.head = self._linear(program.head.weight)
        # The compiled ops hold what they need; the unpacked matrices may go.
        self._weights = {}

    def run(self, batch: TokenBatch) -> Float32:
        """The rows that the head reads, fp32 [T, width]: a view that the next call overwrites."""
        self._pool.copy_pages(batch.page_copies)
        self._reserve(padded(batch.num_rows, ROW_TILE))
        step = Step(batch, self._buffers, self._rope, self.program.num_rope_tables, self._pool)
        # Silent overflow and NaN are those of one row: a broken request must not flood the log.
        with np.errstate(all="ignore"):
            for op in self._ops:
                op(step)
        source = self.program.head.source
        return step.wide[source][: step.rows, : self._widths[source]]

    def packed_linears(self) -> list[PackedLinear]:
        """The weights of all linears and of the head."""
        return list(self._packed.values())

    def _reserve(self, num_rows: int) -> None:
        """Zeroed buffers of at least `num_rows` rows; their width is padded for `PackedLinear`."""
        if num_rows > self._capacity:
            self._capacity = num_rows
            self._buffers = {
                name: np.zeros((num_rows, padded(width, COLUMN_UNIT)), np.float32)
                for name, width in self._widths.items()
            }

    def _compile(self, op: Op) -> CompiledOp:
        if isinstance(op, Embed):
            return self._embed(op)
        if isinstance(op, EmbedPositions):
            return self._embed_positions(op)
        if isinstance(op, Cast):
            return self._cast(op)
        if isinstance(op, LayerNorm):
            return self._layer_norm(op)
        if isinstance(op, RMSNorm):
            return self._rms_norm(op)
        if isinstance(op, Linear):
            return self._linear_op(op)
        if isinstance(op, Gather):
            return self._gather(op)
        if isinstance(op, RopeStore):
            return self._rope_store(op)
        if isinstance(op, Route):
            return self._route(op)
        if isinstance(op, Experts):
            return self._experts(op)
        return self._attention(op)

    def _linear(self, name: str) -> PackedLinear:
        packed = self._packed.get(name)
        if packed is None:
            weight = _float32(self._weights[name])
            if self._rounds and self._weights[name].dtype != ml_dtypes.bfloat16:
                weight = weight.copy()
                round_bfloat16(weight)
            packed = self._packed[name] = PackedLinear(weight)
        return packed

    def _embed(self, op: Embed) -> CompiledOp:
        table, out, width = self._weights[op.weight], op.out, self._widths[op.out]
        rounds, scale = self._rounds, np.float32(op.scale)

        def run(step: Step) -> None:
            rows = _float32(table[step.token_ids])
            if rounds:
                round_bfloat16(rows)
            if scale != 1:
                rows *= scale
            if step.slots is not None:
                self.adapters.add_embeddings(step.slots[: step.rows], step.token_ids, rows)
            step.wide[out][: step.rows, :width] = rows

        return run

    def _embed_positions(self, op: EmbedPositions) -> CompiledOp:
        table, out, width = self._weights[op.weight], op.out, self._widths[op.out]

        def run(step: Step) -> None:
            step.wide[out][: step.rows, :width] += _float32(table[step.positions + op.offset])

        return run

    def _cast(self, op: Cast) -> CompiledOp:
        width, rounds = self._widths[op.out], op.out in self._rounded

        def run(step: Step) -> None:
            source, target = step.wide[op.source][:, :width], step.wide[op.out][:, :width]
            if op.add is not None:
                source += step.wide[op.add][:, :width]
            target[...] = source
            if rounds:
                round_bfloat16(target)

        return run

    def _layer_norm(self, op: LayerNorm) -> CompiledOp:
        weight = _float32(self._weights[op.weight])
        bias = _float32(self._weights[op.bias]) if op.bias is not None else None
        width, epsilon, rounds = self._widths[op.source], np.float32(op.epsilon), op.out in self._rounded

        def run(step: Step) -> None:
            x, y = step.wide[op.source][:, :width], step.wide[op.out][:, :width]
            mean: Float32 = np.add.reduce(x, axis=-1, keepdims=True)
            mean /= np.float32(width)
            centred: Float32 = x - mean
            _rms_norm(centred, weight, epsilon, y)
            if bias is not None:
                y += bias
            if rounds:
                round_bfloat16(y)

        return run

    def _rms_norm(self, op: RMSNorm) -> CompiledOp:
        weight = _float32(self._weights[op.weight])
        source, add, out, width = op.source, op.add, op.out, self._widths[op.source]
        epsilon, rounds = np.float32(op.epsilon), op.out in self._rounded

        def run(step: Step) -> None:
            x, y = step.wide[source][:, :width], step.wide[out][:, :width]
            if add is not None:
                x += step.wide[add][:, :width]
            _rms_norm(x, weight, epsilon, y)
            if rounds:
                round_bfloat16(y)

        return run

    def _linear_op(self, op: Linear) -> CompiledOp:
        packed = self._linear(op.weight)
        bias = _float32(self._weights[op.bias]) if op.bias is not None and op.bias in self._weights else None
        source, out, epilogue = op.source, op.out, op.epilogue
        depth, width, columns = packed.depth, self._widths[op.out], packed.num_columns
        rounds, direct, scale = op.out in self._rounded, op.epilogue == "none", np.float32(op.scale)

        def block(step: Step, begin: int) -> None:
            rows = slice(begin, min(begin + _BLOCK_ROWS, step.padded_rows))
            target = step.wide[out][rows]
            wide = target if direct else np.empty((len(target), packed.padded_columns), np.float32)
            packed.multiply(step.wide[source][rows, :depth], wide)
            y = wide[:, :columns]
            if bias is not None:
                y += bias
            if step.slots is not None:
                self.adapters.add_products(op.weight, step.slots[rows], step.wide[source][rows, :depth], y)
            if epilogue == "residual":
                if scale != 1:
                    y *= scale
                target[:, :width] += y
            elif epilogue == "silu_mul":
                _silu_mul(y, target[:, :width])
            elif epilogue == "gelu_mul":
                np.multiply(_gelu(y[:, :width]), y[:, width:], out=target[:, :width])
            elif epilogue == "gelu":
                target[:, :width] = _gelu(y)
            elif epilogue == "gelu_erf":
                target[:, :width] = _gelu_erf(y)
            elif epilogue == "relu":
                np.maximum(y, np.float32(0), out=target[:, :width])
            if rounds:
                round_bfloat16(target[:, :width])

        def run(step: Step) -> None:
            self._workers.run([partial(block, step, i) for i in range(0, step.padded_rows, _BLOCK_ROWS)])

        return run

    def _route(self, op: Route) -> CompiledOp:
        width, top_k = self._widths[op.source], op.top_k

        def run(step: Step) -> None:
            scores = step.wide[op.source][: step.rows, :width]
            routes = step.wide[op.out][: step.rows]
            chosen = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
            e = np.exp(scores - np.take_along_axis(scores, chosen[:, :1], 1))
            weights = np.take_along_axis(e, chosen, 1)
            weights /= np.add.reduce(weights if op.normalized else e, axis=1, keepdims=True)
            routes[:, :top_k] = weights
            routes[:, top_k : 2 * top_k] = chosen

        return run

    def _experts(self, op: Experts) -> CompiledOp:
        gate_up, down = list(map(self._linear, op.gate_up)), list(map(self._linear, op.down))
        width, top_k, rounds = self._widths[op.out], self._widths[op.routes] // 2, self._rounds
        depth, hidden, tall = gate_up[0].depth, gate_up[0].num_columns // 2, gate_up[0].padded_columns

        def expert(step: Step, number: int, rows: Indices, weights: Float32) -> None:
            count, size = len(rows), padded(len(rows), ROW_TILE)
            source = np.zeros((size, depth), np.float32)
            source[:count] = step.wide[op.source][rows, :depth]
            both = np.empty((size, tall), np.float32)
            gate_up[number].multiply(source, both)
            inner = np.zeros((size, down[number].depth), np.float32)
            if op.epilogue == "silu_mul":
                _silu_mul(both[:, : 2 * hidden], inner[:, :hidden])
            else:
                np.multiply(_gelu(both[:, :hidden]), both[:, hidden : 2 * hidden], out=inner[:, :hidden])
            if rounds:
                round_bfloat16(inner)
            product = np.empty((size, down[number].padded_columns), np.float32)
            down[number].multiply(inner, product)
            step.wide[op.out][rows, :width] += product[:count, :width] * weights[:, None]

        def run(step: Step) -> None:
            routes = step.wide[op.routes][: step.rows, : 2 * top_k]
            chosen = routes[:, top_k:].astype(np.intp)
            for number in np.unique(chosen).tolist():
                rows, places = np.nonzero(chosen == number)
                expert(step, number, rows, routes[rows, places])

        return run

    def _gather(self, op: Gather) -> CompiledOp:
        order, width = self._weights[op.order], self._widths[op.out]
        if order.dtype != np.int32 or order.min() < 0 or order.max() >= width:
            raise ValueError(f"weight {op.order} is no order of {width} elements")

        def run(step: Step) -> None:
            step.wide[op.out][:, :width] = step.wide[op.source][:, order]

        return run

    def _rope_store(self, op: RopeStore) -> CompiledOp:
        q_heads, kv_heads, dim, layer = op.num_heads, op.num_kv_heads, op.head_dim, op.layer
        half, q_size, width = op.rotary_dim // 2, op.num_heads * op.head_dim, self._widths[op.source]
        source, out, pool, epsilon = op.source, op.out, self._pool, np.float32(op.epsilon)
        norms = [
            (part, _float32(self._weights[name]))
            for part, name in (
                (slice(0, q_heads), op.q_norm),
                (slice(q_heads, q_heads + kv_heads), op.k_norm),
            )
            if name is not None
        ]

        def run(step: Step) -> None:
            rows = step.wide[source][:, :width]
            heads = rows.reshape(step.padded_rows, q_heads + 2 * kv_heads, dim)
            cos, sin = step.turns[op.table]
            for part, weight in norms:
                target = heads[:, part]
                if len(weight) != dim:
                    target = rows[:, part.start * dim : part.stop * dim]
                _rms_norm(target, weight, epsilon, target)
            first, second = (
                heads[:, : q_heads + kv_heads, :half],
                heads[:, : q_heads + kv_heads, half : 2 * half],
            )
            turned = first * cos
            turned -= second * sin
            second *= cos
            second += first * sin
            first[...] = turned
            step.wide[out][:, :q_size] = rows[:, :q_size]
            kv = heads[: step.rows, q_heads:].reshape(step.rows, 2, kv_heads, dim)
            if step.written is not None:
                kv = kv[step.written]
            pool.store(layer, step.frames, step.pages, step.offsets, kv)

        return run

    def _attention(self, op: Attention) -> CompiledOp:
        width, rounds, pool = self._widths[op.source], op.out in self._rounded, self._pool

        def run(step: Step) -> None:
            target = step.wide[op.out][:, :width]
            queries = step.wide[op.source][:, :width]
            groups = step.attention_plan(op).groups
            self._workers.run([partial(run_attention, op, group, pool, queries, target) for group in groups])
            if rounds:
                round_bfloat16(target)

        return run


def _rms_norm(x: Float32, weight: Float32, epsilon: np.float32, out: Float32) -> None:
    """`RMSNorm` over the last axis; `out` may be `x`."""
    mean = np.add.reduce(x * x, axis=-1, keepdims=True)
    mean /= np.float32(x.shape[-1])
    mean += epsilon
    np.sqrt(mean, out=mean)
    np.divide(_ONE, mean, out=mean)
    np.multiply(x, mean, out=out)
    out *= weight


def _silu_mul(gate_up: Float32, out: Float32) -> None:
    """The silu_mul epilogue of `Linear`: fp32 [R, 2 N] -> [R, N]."""
    width = out.shape[1]
    gate, up = gate_up[:, :width], gate_up[:, width:]
    scale = np.negative(gate)
    np.exp(scale, out=scale)
    scale += _ONE
    np.divide(gate, scale, out=scale)
    np.multiply(scale, up, out=out)


def _gelu(x: Float32) -> Float32:
    """gelu in its tanh form."""
    inner = x * x
    inner *= x
    inner *= np.float32(0.044715)
    inner += x
    inner *= np.float32(0.7978845608028654)
    np.tanh(inner, out=inner)
    inner += _ONE
    inner *= x
    inner *= np.float32(0.5)
    return inner


def _gelu_erf(x: Float32) -> Float32:
    """gelu in its exact form."""
    t = np.abs(x)
    t *= np.float32(0.25)
    t += _ONE
    np.divide(_ONE, t, out=t)
    share = np.full_like(t, GELU_ERF_TERMS[0])
    for term in GELU_ERF_TERMS[1:]:
        share *= t
        share += term
    share *= t
    tail = x * x
    tail *= np.float32(-0.5)
    np.exp(tail, out=tail)
    share *= tail
    np.subtract(_ONE, share, out=share, where=x >= 0)
    share *= x
    return share


def _float32(array: NDArray[Any]) -> Float32:
    """The same values in fp32; not a copy where they are already."""
    if array.dtype == ml_dtypes.bfloat16:
        return from_bfloat16_bits(array.view(np.uint16))
    return array.astype(np.float32, copy=False)


def _shifted(array: NDArray[Any], offset: float) -> NDArray[Any]:
    """`WeightSpec.offset` added."""
    return _float32(array) + np.float32(offset) if offset else array


def _checked(array: NDArray[Any], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"weight {name} has shape {array.shape}, but the program needs {shape}")
    return array
