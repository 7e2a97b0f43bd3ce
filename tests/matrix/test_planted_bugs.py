"""The comparison can fail: two planted ordering bugs change bits, and `==` sees them.

Both give results that are right to fp32 rounding; only the order of additions depends on the batch.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.matrix.test_pairs import changed, company
from tests.matrix.workload import Outputs, Setup, base_requests, serve
from tokenloom.kernels.reference import gemm, sampler


def differs() -> bool:
    requests = changed(base_requests(0))
    alone: Outputs = {}
    for request in requests:
        alone |= serve(Setup(), [request])
    return serve(Setup(during=company), changed(base_requests(0))) != alone


def test_the_comparison_holds_without_a_bug() -> None:
    assert not differs()


def test_a_product_whose_kernel_depends_on_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(self: gemm.PackedLinear, source: np.ndarray, out: np.ndarray) -> None:
        weight = np.concatenate([tile[0] for tile in self._tiles], axis=1)
        if self._rest is not None:
            weight = np.concatenate([weight, self._rest], axis=1)
        half = self.depth // 2 if len(source) > gemm.ROW_TILE else self.depth
        out[:] = source[:, :half] @ weight[:half]
        if half < self.depth:
            out += source[:, half:] @ weight[half:]

    monkeypatch.setattr(gemm.PackedLinear, "multiply", multiply)
    assert differs()


def test_a_sum_over_the_vocabulary_whose_order_depends_on_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def log_softmax(logits: np.ndarray) -> np.ndarray:
        values = logits - logits.max(axis=1, keepdims=True)
        terms = np.exp(values)
        sums = np.zeros(len(terms), np.float32)
        step = 1 if len(terms) > 4 else terms.shape[1]
        for first in range(0, terms.shape[1], step):
            sums += terms[:, first : first + step].sum(axis=1)
        return values - np.log(sums)[:, None]

    monkeypatch.setattr(sampler, "log_softmax", log_softmax)
    assert differs()
