"""A few threads for the parts of a step that fall into independent blocks of rows.

numpy lets go of the interpreter lock inside its loops and products, so blocks truly run side by side. What a
block computes does not depend on the thread that takes it, nor on how many there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Task = Callable[[], None]


class Workers:
    """`num_threads` threads, the caller's included; 1 starts none."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads cannot do any work")
        self._num_extra = num_threads - 1
        self._pool = ThreadPoolExecutor(self._num_extra, "tokenloom-rows") if self._num_extra else None

    def run(self, tasks: Sequence[Task]) -> None:
        """Run every task once, in any order, and return when all are done. Raises what a task raised."""
        if self._pool is None or len(tasks) < 2:
            for task in tasks:
                task()
            return
        taken = itertools.count()

        def work() -> None:
            # The error state of numpy belongs to a thread. `next` on a count is atomic.
            with np.errstate(all="ignore"):
                while (index := next(taken)) < len(tasks):
                    tasks[index]()

        futures = [self._pool.submit(work) for _ in range(min(self._num_extra, len(tasks) - 1))]
        try:
            work()
        finally:
            for future in futures:
                future.exception()
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads; `run` must not be called again."""
        if self._pool is not None:
            self._pool.shutdown()
