"""Rounding of a weight matrix to int4 with scales and zeros that fit each group: for weights that were rounded to
4 bits before, on a grid that is not ours, where the nearest step of a plain grid would add as much again.

Every operation is one IEEE 754 operation in fp32 unless another format is named, rounded to nearest, ties to even;
a sum over a group adds its second half to its first until one number is left. So any other implementation can be
compared with `==`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tokenloom.errors import ModelError
from tokenloom.quantization.round_to_nearest import Rows
from tokenloom.quantization.weights import Float32, Int4Matrix, UInt8, row_blocks

GROUP: Final = 32
"""Inputs that share a scale and a zero."""

_ROUNDS: Final = 2
_GROUPS_AT_ONCE: Final = 1 << 12


def int4(weight: Rows, name: str = "weight") -> Int4Matrix:
    """`weight` [N, K] of floats, K a multiple of 32, in groups of 32. Per group:
        low  = min(min w, 0); high = max(max w, 0)
        step = (high - low) / 15; where that is 0, 1
        for zero in floor(-low / step), ceil(-low / step), each clipped to [0, 15]:
            scale = float16(step); where that is 0, 1; used as fp32 from here on
            twice: u = clip(rint(w / scale), -zero, 15 - zero)
                   scale = float16(sum(w * u) / sum(u * u)), where that is finite and not 0
            u = clip(rint(w / scale), -zero, 15 - zero); loss = sum((w - u * scale)^2)
        what has the smaller loss, the first of equals; q = u + zero
    Raises `ModelError`, with `name`, for a value that is not finite or a scale that is too large for float16.
    """
    q = np.empty(weight.shape, np.uint8)
    groups = (len(weight), weight.shape[1] // GROUP)
    scales, zeros = np.empty(groups, np.float16), np.empty(groups, np.uint8)
    for rows in row_blocks(weight.shape):
        block = weight[rows].astype(np.float32).reshape(-1, GROUP)
        out = q[rows].reshape(-1, GROUP), scales[rows].reshape(-1), zeros[rows].reshape(-1)
        for start in range(0, len(block), _GROUPS_AT_ONCE):
            part = slice(start, start + _GROUPS_AT_ONCE)
            out[0][part], out[1][part], out[2][part] = _fit(block[part], name)
    return Int4Matrix(q, scales, zeros, GROUP)


def _fit(block: Float32, name: str) -> tuple[UInt8, Float32, UInt8]:
    """q, scales and zeros of groups [n, 32]."""
    low, high = block.min(axis=1, initial=0), block.max(axis=1, initial=0)
    with np.errstate(over="ignore", invalid="ignore"):
        step = (high - low) / np.float32(15)
        is_sound = np.isfinite(step.astype(np.float16))
    if not is_sound.all():
        i = int(np.flatnonzero(~is_sound)[0])
        raise ModelError(
            f"{name} with values from {low[i]:g} to {high[i]:g}", "groups that a float16 scale spans"
        )
    step[step == 0] = 1
    best: tuple[Float32, Float32, Float32, Float32] | None = None
    for whole in (np.floor, np.ceil):
        zero = np.clip(whole(-low / step), 0, 15).astype(np.float32)
        fitted = (*_fit_zero(block, step, zero), zero)
        if best is None:
            best = fitted
            continue
        is_better = fitted[2] < best[2]
        for kept, new in zip(best, fitted, strict=True):
            kept[is_better] = new[is_better]
    assert best is not None  # two were tried
    u, scale, _, zero = best
    u += zero[:, None]
    return u.astype(np.uint8), scale, zero.astype(np.uint8)


def _fit_zero(block: Float32, step: Float32, zero: Float32) -> tuple[Float32, Float32, Float32]:
    """u [n, 32], scales and losses [n] of groups with these zeros."""
    scale = step.astype(np.float16).astype(np.float32)
    scale[scale == 0] = 1
    lowest, highest = -zero[:, None], 15 - zero[:, None]
    for _ in range(_ROUNDS):
        u = np.clip(np.rint(block / scale[:, None]), lowest, highest)
        with np.errstate(all="ignore"):
            fitted = (_sum(block * u) / _sum(u * u)).astype(np.float16).astype(np.float32)
        scale = np.where(np.isfinite(fitted) & (fitted != 0), fitted, scale)
    u = np.clip(np.rint(block / scale[:, None]), lowest, highest)
    error = block - u * scale[:, None]
    return u, scale, _sum(error * error)


def _sum(values: Float32) -> Float32:
    """Over the last axis, a power of two long."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[:, :half] + values[:, half:]
    total: Float32 = values[:, 0]
    return total
