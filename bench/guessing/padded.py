"""What sequences that accept different numbers of tokens cost where a batch is a rectangle.

After EQSPEC in "Batch Speculative Decoding Done Right" (arXiv 2510.22876): when a step has been verified, keys and
values of each sequence are shifted until all end in one column again. Only those that have to move are moved, in place
and by several threads: a careful implementation, which copies less than one that takes padding off and puts it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray


class PaddedKV:
    """Keys and values [2 * layers, batch, heads, columns, head_dim]: row i has its tokens in the columns from
    `padding[i]` to `width`.

    `lengths` are the tokens of the rows at the start; there is room for `growth` more columns. `shape` is (layers,
    heads, head_dim).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        lengths: Sequence[int],
        growth: int,
        *,
        dtype: str = "uint16",
        threads: int = 1,
    ) -> None:
        layers, heads, head_dim = shape
        self.lengths = np.array(lengths, np.int64)
        self.width = int(self.lengths.max())
        # Ones, so that every page of memory is there before anything is timed.
        columns = self.width + growth
        self.kv = np.ones((2 * layers, len(lengths), heads, columns, head_dim), dtype)
        self._parts = np.array_split(np.arange(2 * layers), threads)
        self._pool = ThreadPoolExecutor(threads)

    @property
    def padding(self) -> NDArray[np.int64]:
        """Columns before each row's first token: int64 [batch]."""
        return self.width - self.lengths

    def accept(self, taken: Sequence[int]) -> float:
        """Each row has `taken[i]` tokens more, in the columns from `width` on: align them again. Returns the seconds
        that it took; none where nothing has to move."""
        began = perf_counter()
        counts = np.array(taken, np.int64)
        width = int((self.lengths + counts).max())
        shifts = width - self.width - counts
        moves = [
            (row, int(self.padding[row]), self.width + taken[row], int(shifts[row]))
            for row in np.flatnonzero(shifts).tolist()
        ]
        if moves:
            list(self._pool.map(self._shift, self._parts, [moves] * len(self._parts)))
        self.lengths += counts
        self.width = width
        return perf_counter() - began if moves else 0.0

    def _shift(self, part: NDArray[np.int64], moves: Sequence[tuple[int, int, int, int]]) -> None:
        """Move [begin, end) of each (row, begin, end, shift) by `shift` columns, in the layers of `part`."""
        for layer in part:
            for row, begin, end, shift in moves:
                # The two overlap, so numpy copies what it moves first; one row of one layer stays in the cache.
                heads = self.kv[layer, row]
                heads[:, begin + shift : end + shift] = heads[:, begin:end]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
