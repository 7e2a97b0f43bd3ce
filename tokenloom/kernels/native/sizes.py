"""Bytes of what the native kernels hold, computed without them, for a plan that is made before anything is.

Each function mirrors a layout or a buffer of native/src, which it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.native.packed_forms import WeightForm
from tokenloom.kernels.program import Attention, BufferSpec, Experts, Program

_ITEM_BYTES: Final[Mapping[str, int]] = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_PANEL: Final = 32
_ALIGN: Final = 64
_TILE_ROWS: Final = 64
_STEADY_ROWS: Final = 512
_SPLIT: Final = 128
_LANES: Final = 16
_QUERY_TILE: Final = 12
_BLOCK_VECTORS: Final = 192
_BLOCK_ROWS: Final = 128
_TREE_PAGES: Final = 6
_SPLIT_PAGES: Final = 8
_SAMPLER_BYTES: Final = 16
_MEMBER_BYTES: Final = 12


def form_bytes(form: WeightForm) -> int:
    """Bytes of a weight: of a packed one its panels, the space behind them and the scales of int8, as
    `PackedWeight.nbytes`; else of its numbers."""
    if form.kind != "packed":
        return math.prod(form.shape) * _ITEM_BYTES[form.format]
    rows, depth = form.shape
    if form.format == "int4":
        panel = _ceil(depth, form.group) * _aligned(form.group // 2 * _PANEL + 3 * _PANEL)
    else:
        panel = _ceil(depth, 4 // _ITEM_BYTES[form.format]) * 4 * _PANEL
    scales = 4 * _PANEL if form.format == "int8" else 0
    return _ceil(rows, _PANEL) * (panel + scales) + _ALIGN


def quantized_row_bytes(form: WeightForm) -> int:
    """What a row of activations takes once it is rounded for a weight (`QuantizedRows`)."""
    if form.format not in ("int8", "int4"):
        return 0
    depth = form.shape[1]
    groups = _ceil(depth, form.group) if form.format == "int4" else 1
    return _aligned(groups * form.group if form.format == "int4" else depth) + 4 + 4 * groups


def step_bytes(
    program: Program,
    weights: Mapping[str, WeightForm],
    *,
    dtype: str,
    kv_dtype: str,
    max_batch_tokens: int,
    max_context: int,
    num_threads: int,
) -> int:
    """Upper bound of the buffers of steps of up to `max_batch_tokens` rows (native/src/model.hpp)."""
    # Buffers grow to twice their rows, up to `_STEADY_ROWS`.
    rows = max(max_batch_tokens, min(2 * max_batch_tokens, _STEADY_ROWS))
    buffers = {buffer.name: _row_bytes(buffer, dtype) for buffer in program.buffers}
    total = sum(rows * size + _ALIGN for size in buffers.values())
    routes = {buffer.name: buffer.width // 2 for buffer in program.buffers}
    experts = [op for op in program.ops if isinstance(op, Experts)]
    # Each row counts once for each of its experts.
    members = {name: rows * routes[op.routes] for op in experts for name in (*op.gate_up, *op.down)}
    total += max(
        (
            max(members.get(name, rows), _TILE_ROWS) * quantized_row_bytes(form)
            for name, form in weights.items()
        ),
        default=0,
    )
    for op in experts[:1]:
        hidden = BufferSpec("", weights[op.down[0]].shape[1], "activation")
        total += members[op.down[0]] * (buffers[op.source] + _row_bytes(hidden, dtype) + _MEMBER_BYTES)
    total += _TILE_ROWS * (buffers[program.head.source] + 4 * _padded(program.vocab_size))
    total += num_threads * _SAMPLER_BYTES * program.vocab_size
    total += hidden_bytes(program, max_batch_tokens)
    return total + _attention_bytes(program, kv_dtype, max_batch_tokens, max_context, num_threads)


def hidden_bytes(program: Program, max_batch_tokens: int) -> int:
    """What the hidden rows of a step take that pools every row, and the blocks in which they are summed
    (`tokenloom.engine.pooling`)."""
    width = next(buffer.width for buffer in program.buffers if buffer.name == program.head.source)
    return (4 * max_batch_tokens + 2 * 8 * (_TILE_ROWS + 1)) * width


def _attention_bytes(
    program: Program, kv_dtype: str, max_batch_tokens: int, max_context: int, num_threads: int
) -> int:
    """Scratch of each thread, and for each kind of window the partial results of contexts that threads share
    (native/src/attention.cpp)."""
    kv = program.kv
    tile_bytes = 4 * (2 * _LANES + _QUERY_TILE * _ceil(kv.head_dim, 16) * 16)
    shapes = {(op.num_heads, op.window) for op in program.ops if isinstance(op, Attention)}
    scratch = partials = 0
    for num_heads, window in shapes:
        group = num_heads // kv.num_kv_heads
        vectors = min(max(_BLOCK_VECTORS, group), max_batch_tokens * group)
        tiles = _ceil(vectors, _QUERY_TILE)
        pages = _TREE_PAGES * kv_page_bytes(kv, kv_dtype, "native") // (kv.num_layers * kv.num_kv_heads)
        expanded = _SPLIT_PAGES * 2 * (_aligned(kv.head_dim * 32) + 512) if kv_dtype == "int8" else 0
        queries = tiles * kv.head_dim * _QUERY_TILE * 4 + _ALIGN
        scratch = max(
            scratch,
            queries + (tiles + 1) * tile_bytes + 2 * _QUERY_TILE * _SPLIT * 4 + expanded + pages,
        )
        # Only a block with more than num_kv_heads / (2 num_threads) of all work is shared, so there are fewer
        # than the inverse of such blocks.
        blocks = _ceil(2 * num_threads, kv.num_kv_heads) - 1 if num_threads > 1 else 0
        keys = max_context if window is None else min(max_context, window + _BLOCK_ROWS)
        # Keys may begin inside a split. Pages of the buffer are taken as they are written.
        splits = _ceil(keys, _SPLIT) + 1
        partials += min(blocks, max_batch_tokens) * kv.num_kv_heads * tiles * tile_bytes * splits
    return num_threads * scratch + partials


def _row_bytes(buffer: BufferSpec, dtype: str) -> int:
    return _padded(buffer.width) * (2 if buffer.dtype == "activation" and dtype == "bfloat16" else 4)


def _padded(width: int) -> int:
    return _ceil(width, 64) * 64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _aligned(size: int) -> int:
    return _ceil(size, _ALIGN) * _ALIGN
