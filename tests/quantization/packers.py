"""AWQ and GPTQ files written number by number from the definitions of the formats."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_parts(
    rows: int, depth: int, group: int, seed: int = 0, *, zero_from: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q uint8 [rows, depth], scales float16 and zeros uint8 [rows, depth / group]; zeros cover 16 values."""
    rng = np.random.default_rng(seed)
    groups = depth // group
    q = rng.integers(0, 16, (rows, depth)).astype(np.uint8)
    scales = (rng.random((rows, groups)) * 0.02 + 0.001).astype(np.float16)
    zeros = (rng.integers(0, 16, (rows, groups)) + zero_from).astype(np.uint8)
    return q, scales, zeros


def words(count: int, values: dict[tuple[int, int, int], int], shape: tuple[int, int]) -> np.ndarray:
    """int32 of `shape` whose word (r, c) has the value of (r, c, i) as its i-th number of `count`."""
    out = np.zeros(shape, np.int64)
    bits = 32 // count
    for (row, column, i), value in values.items():
        assert 0 <= value < 1 << bits and i < count
        out[row, column] += value << (bits * i)
    return out.astype(np.uint32).view(np.int32)


def pack_awq(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """qweight, qzeros and scales of AutoAWQ: words along the outputs, in the order 0 2 4 6 1 3 5 7."""

    def along_outputs(matrix: np.ndarray) -> np.ndarray:
        rows, depth = matrix.shape
        place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
        values = {(k, n // 8, place[n % 8]): int(matrix[n, k]) for n in range(rows) for k in range(depth)}
        return words(8, values, (depth, rows // 8))

    return {"qweight": along_outputs(q), "qzeros": along_outputs(zeros), "scales": scales.T.copy()}


def pack_gptq(
    q: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    *,
    version: int = 1,
    order: bool = True,
    bits: int = 4,
) -> dict[str, np.ndarray]:
    """qweight, qzeros, scales and, with `order`, g_idx: words along the inputs for q, along the outputs for
    zeros, which version 1 stores less one."""
    rows, depth = q.shape
    groups = scales.shape[1]
    c = 32 // bits
    values = {(k // c, n, k % c): int(q[n, k]) for n in range(rows) for k in range(depth)}
    stored = {
        (g, n // c, n % c): int(zeros[n, g]) - (version == 1) for n in range(rows) for g in range(groups)
    }
    parts: dict[str, Any] = {
        "qweight": words(c, values, (depth // c, rows)),
        "qzeros": words(c, stored, (groups, rows // c)),
        "scales": scales.T.copy(),
    }
    if order:
        parts["g_idx"] = np.array([k // (depth // groups) for k in range(depth)], np.int32)
    return parts
