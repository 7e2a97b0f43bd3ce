"""Who may start: as soon as the prompt fits, or only if everybody's longest output would fit as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from tokenloom.engine.batch import PAGE_SIZE

AdmissionPolicy = Literal["optimistic", "reserve"]
"""optimistic: pages for the prompt are enough, and who runs out of them later preempts. reserve: nobody is ever
preempted for pages but samples of one request that never fit together, at the price of fewer running sequences (the
admission of S-LoRA, Sheng et al. 2023)."""


class Demand(NamedTuple):
    """What a sequence holds, and how much it may still produce, in tokens."""

    have: int
    left: int


def peak_tokens(demands: Iterable[Demand]) -> int:
    """Most tokens that all hold at once if each produces one per step and leaves after its last.

    The k sequences with most to come hold what they have and k times what the k-th of them has left when that one
    is done; the peak is the largest of these.
    """
    total = peak = 0
    for k, demand in enumerate(sorted(demands, key=lambda demand: -demand.left), start=1):
        total += demand.have
        peak = max(peak, demand.left * k + total)
    return peak


def peak_pages(demands: Iterable[Demand]) -> int:
    """Pages that cover the peak whatever the lengths are within their pages."""
    return -(-peak_tokens(Demand(d.have + PAGE_SIZE - 1, d.left) for d in demands) // PAGE_SIZE)
