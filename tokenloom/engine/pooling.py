"""From the final rows of a prompt to one vector.

What is pooled is what the head reads: the hidden state behind the last norm. Mean pooling sums the rows in their
order in one float64 accumulator per element, so that chunks, company and preemption cannot change a bit; last
pooling is the sum over the one last row.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.request import Pooling, Request
from tokenloom.errors import InvalidParameter

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_BLOCK_ROWS = 64
"""Rows that are widened at once."""


def check_pooling(request: Request) -> None:
    """Raise `InvalidParameter` unless a request with `pooling` asks for the embedding of its prompt alone."""
    params = request.params
    if request.pooling not in get_args(Pooling):
        raise InvalidParameter("pooling", request.pooling, f"one of {', '.join(get_args(Pooling))}")
    for name, value, wanted in (
        ("max_tokens", params.max_tokens, 0),
        ("n", params.n, 1),
        ("prompt_logprobs", params.prompt_logprobs, None),
    ):
        if value != wanted:
            raise InvalidParameter(name, value, f"{wanted} for an embedding")


def first_pooled(pooling: Pooling | None, num_prompt: int) -> int:
    """The first row of a prompt that goes into its embedding; `num_prompt` where none does."""
    return {None: num_prompt, "last": num_prompt - 1, "mean": 0}[pooling]


def add_rows(total: Float64 | None, rows: Float32) -> Float64:
    """`total` [W] (None: nothing yet) plus the `rows` [R, W], one after the other."""
    if total is None:
        total = np.zeros(rows.shape[1], np.float64)
    for begin in range(0, len(rows), _BLOCK_ROWS):
        block = np.concatenate([total[None], rows[begin : begin + _BLOCK_ROWS]], dtype=np.float64)
        # `sum` may add in pairs; `accumulate` is defined one by one. Overflow is that of a broken model.
        with np.errstate(all="ignore"):
            total = np.add.accumulate(block, axis=0)[-1].copy()
    return total


def mean_bytes(total: Float64, num_rows: int) -> bytes:
    """The mean, rounded once to float32; little-endian, as a `SequenceDelta` carries it."""
    with np.errstate(all="ignore"):
        return (total / num_rows).astype("<f4").tobytes()


def vector_of(data: bytes) -> Float32:
    """float32 [W] of the bytes that a `SequenceDelta` carries."""
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def normalized(vector: Float32) -> Float32:
    """The vector over its Euclidean length, which is rounded once; zeros stay zeros."""
    wide = vector.astype(np.float64)
    length = math.sqrt(math.fsum((wide * wide).tolist()))
    return (wide / length).astype(np.float32) if length else vector
