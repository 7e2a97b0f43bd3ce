"""The probes must see a product or a function that treats rows differently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.reference import fingerprint


def test_fixed_values_are_fixed() -> None:
    values = fingerprint.fixed_values(2, 3)
    assert values.tolist() == GOLDEN
    many = fingerprint.fixed_values(100, 100)
    assert abs(many.mean()) < 0.05
    assert 1.1 < many.std() < 1.2


GOLDEN = [
    [-1.3899027109146118, -0.7798053026199341, 0.4294396638870239],
    [-0.18161356449127197, -1.5785526037216187, -1.1411205530166626],
]


def test_a_product_that_sees_its_neighbours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.matmul

    def product(a: Any, b: Any, **options: Any) -> Any:
        return plain(a, b, **options) + np.float32(a[1, 0] * 1e-7)

    source, weight = fingerprint.fixed_values(4, 8), fingerprint.fixed_values(8, 16)
    assert (fingerprint.check_product(source, weight) == plain(source, weight)).all()
    monkeypatch.setattr(np, "matmul", product)
    with pytest.raises(UnsupportedFeature, match="matrix product"):
        fingerprint.check_product(source, weight)


def test_a_function_that_counts_rows_is_refused() -> None:
    rows = fingerprint.fixed_values(4, 8)
    assert (fingerprint.check_rows(np.exp, rows) == np.exp(rows)).all()
    with pytest.raises(UnsupportedFeature, match="alone"):
        fingerprint.check_rows(lambda part: part + np.float32(len(part)), rows)
