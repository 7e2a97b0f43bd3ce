"""Packed weights on disk: what comes back is what was kept, and damage is noticed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tokenloom.errors import ModelError  # noqa: E402
from tokenloom.kernels.native.weight_cache import WeightCache  # noqa: E402
from tokenloom.kernels.native.weights import PackedTable  # noqa: E402


@pytest.fixture
def pool() -> Any:
    return native.ThreadPool(2)


def some_weights(pool: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((70, 48)).astype(np.float32)
    table = rng.standard_normal((11, 6)).astype(ml_dtypes.bfloat16)
    return {
        "linear": native.pack(pool, [matrix], ["float32"], "bfloat16", False, 0),
        "pair": native.pack(pool, [matrix[:32], matrix[32:64]], ["float32"] * 2, "int8", True, 0),
        "table": PackedTable(table),
        "norm": np.arange(5, dtype=np.float32),
    }


def test_round_trip(tmp_path: Path, pool: Any) -> None:
    cache = WeightCache(tmp_path / "new", pool)
    assert cache.load("a") is None
    weights = some_weights(pool)
    cache.save("a", weights)
    found = cache.load("a")
    assert found is not None and list(found) == list(weights)
    for name in ("linear", "pair"):
        for field in ("format", "paired", "shape", "group", "nbytes"):
            assert getattr(found[name], field) == getattr(weights[name], field)
        assert (found[name].data == weights[name].data).all()
        assert (found[name].scales == weights[name].scales).all()
    assert found["table"].values.dtype == ml_dtypes.bfloat16
    assert (found["table"].values == weights["table"].values).all()
    assert (found["norm"] == weights["norm"]).all()
    assert cache.load("b") is None
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".packed"]


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "empty", "other key"])
def test_damage_is_noticed(tmp_path: Path, pool: Any, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = WeightCache(tmp_path, pool)
    cache.save("a", some_weights(pool))
    path = cache.path("a")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[5000] ^= 1
    elif damage == "cut":
        del data[-4097:]
    elif damage == "header":
        data[8:16] = (1 << 60).to_bytes(8, "little")
    elif damage == "empty":
        data.clear()
    else:
        data = bytearray(bytes(data).replace(b'"key": "a"', b'"key": "b"'))
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert cache.load("a") is None
    assert "is not used" in caplog.text


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, pool: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="weight_cache"):
        WeightCache(tmp_path / "file" / "inside", pool).save("a", some_weights(pool))
