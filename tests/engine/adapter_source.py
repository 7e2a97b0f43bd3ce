"""Adapters that exist in name only, and a pool that remembers what lies in which page."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import StepResult, Ticket, TokenBatch
from tokenloom.runtime.simulated import SimulatedExecutor


class FakeSource:
    """`sizes` are pages by adapter. Copying, binding and unbinding are checked against each other."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = dict(sizes)
        self.content: dict[int, tuple[str, int]] = {}
        self.bound: dict[int, tuple[str, list[int]]] = {}
        self.copied: list[tuple[str, int]] = []
        self.cleared = 0
        self.forgotten: list[str] = []

    def num_pages(self, adapter: str) -> int:
        return self.sizes[adapter]

    def copy(self, adapter: str, first: int, pages: NDArray[np.int32]) -> None:
        in_use = {page for _, owned in self.bound.values() for page in owned}
        assert not in_use & set(pages.tolist()), "a page of a bound adapter is written"
        self.copied.append((adapter, len(pages)))
        self.content |= {page: (adapter, first + i) for i, page in enumerate(pages.tolist())}

    def bind(self, adapter: str, slot: int, pages: NDArray[np.int32]) -> None:
        assert slot not in self.bound
        assert [self.content[page] for page in pages.tolist()] == [(adapter, i) for i in range(len(pages))]
        self.bound[slot] = (adapter, pages.tolist())

    def unbind(self, slot: int, pages: NDArray[np.int32]) -> None:
        if slot >= 0:
            assert self.bound.pop(slot)[1] == pages.tolist()
        self.cleared += len(pages)

    def forget(self, adapter: str) -> None:
        assert adapter not in {name for name, _ in self.bound.values()}
        del self.sizes[adapter]
        self.forgotten.append(adapter)


class CheckedExecutor(SimulatedExecutor):
    """Refuses batches that name a slot without an adapter, and counts rows by adapter."""

    source: FakeSource
    rows: dict[str, int]

    def submit(self, batch: TokenBatch) -> Ticket:
        for segment, slot in enumerate(batch.adapter_slots.tolist()):
            name, pages = ("", list[int]()) if slot < 0 else self.source.bound[slot]
            assert [self.source.content[page][0] for page in pages] == [name] * len(pages)
            count = int(batch.starts[segment + 1] - batch.starts[segment])
            self.rows[name] = self.rows.get(name, 0) + count
        return super().submit(batch)

    def collect(self, ticket: Ticket) -> StepResult:
        return super().collect(ticket)
