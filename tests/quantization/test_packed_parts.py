"""AWQ and GPTQ parts against packers written from the formats, and parts that are wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.quantization.packers import pack_awq, pack_gptq, random_parts
from tokenloom.errors import ModelError
from tokenloom.quantization import awq, gptq
from tokenloom.quantization.weights import Int4Matrix

SHAPES = [(8, 32, 32), (16, 64, 32), (24, 128, 64), (40, 256, 128), (8, 384, 128)]


def unpack_gptq(parts: dict[str, np.ndarray], group: int, version: int = 1, symmetric: bool = False) -> Any:
    return gptq.unpack("x.proj", parts, group, zero_offset=int(version == 1), symmetric=symmetric)


def same(matrix: Int4Matrix, q: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> None:
    assert (matrix.q == q).all()
    assert (matrix.zeros == zeros).all()
    assert matrix.scales.tobytes() == np.ascontiguousarray(scales).tobytes()
    for array in (matrix.q, matrix.scales, matrix.zeros):
        assert array.flags.c_contiguous


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
@pytest.mark.parametrize(("rows", "depth", "group"), SHAPES)
def test_awq(monkeypatch: pytest.MonkeyPatch, rows: int, depth: int, group: int, block: int) -> None:
    monkeypatch.setattr(awq, "BLOCK_ELEMENTS", block)
    q, scales, zeros = random_parts(rows, depth, group)
    parts = pack_awq(q, scales, zeros)
    assert awq.shape("x", {name: part.shape for name, part in parts.items()}, group) == (rows, depth)
    same(awq.unpack("x", parts, group), q, scales, zeros)


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize(("rows", "depth", "group"), SHAPES)
def test_gptq(
    monkeypatch: pytest.MonkeyPatch, rows: int, depth: int, group: int, order: bool, version: int, block: int
) -> None:
    monkeypatch.setattr(gptq, "BLOCK_ELEMENTS", block)
    # Version 1 holds zeros of 1 to 16, version 2 of 0 to 15.
    q, scales, zeros = random_parts(rows, depth, group, zero_from=int(version == 1))
    if version == 1:
        zeros[0, 0] = 16
    parts = pack_gptq(q, scales, zeros, version=version, order=order)
    assert gptq.shape("x", {name: part.shape for name, part in parts.items()}, group) == (rows, depth)
    same(unpack_gptq(parts, group, version), q, scales, zeros)


def test_one_word_by_hand() -> None:
    """Bits spelled out: nibbles of 0x76543210 are 0, 1, ... 7 from the low end."""
    word = np.full((32, 1), 0x76543210, np.int32)
    parts = {"qweight": word, "qzeros": word[:1], "scales": np.ones((1, 8), np.float16)}
    matrix = awq.unpack("x", parts, 32)
    assert matrix.q[:, 0].tolist() == matrix.zeros[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    rows = np.full((4, 8), -1985229329, np.int32)  # 0x89ABCDEF: nibbles 15, 14, ... 8
    matrix = unpack_gptq(parts | {"qweight": rows}, 32)
    assert matrix.q[3].tolist() == [15, 14, 13, 12, 11, 10, 9, 8] * 4
    assert matrix.zeros[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_of_a_wider_type_that_float16_holds(dtype: Any) -> None:
    q, scales, zeros = random_parts(8, 64, 32)
    exact = scales.astype(ml_dtypes.bfloat16).astype(np.float16)
    parts = pack_awq(q, exact, zeros)
    same(awq.unpack("x", parts | {"scales": parts["scales"].astype(dtype)}, 32), q, exact, zeros)
    for value in (1e-12, 1e30):
        wide = parts["scales"].astype(dtype)
        wide[1, 3] = value
        with pytest.raises(ModelError, match=r"x\.scales of .* that float16 does not hold"):
            awq.unpack("x", parts | {"scales": wide}, 32)


BAD: list[tuple[str, Any, str]] = [
    (
        "scales",
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, np.nan, a).astype(a.dtype),
        "finite",
    ),
    ("scales", lambda a: (a * np.inf).astype(a.dtype), "finite"),
    ("scales", lambda a: a[:, :-1], "shape"),
    ("scales", lambda a: a[:1], "shape"),
    ("scales", lambda a: a.view(np.int16).astype(np.int32), "dtype int32"),
    ("qzeros", lambda a: a[:, :1], "shape"),
    ("qzeros", lambda a: a.T, "shape"),
    ("qzeros", lambda a: a.astype(np.float32), "dtype float32"),
    ("qweight", lambda a: (a & 15).astype(np.float16), "dtype float16"),
    ("qweight", lambda a: a.ravel(), "shape"),
    ("qweight", lambda a: a[:, :0], "shape"),
    ("qweight", lambda a: a[None], "shape"),
]


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(("part", "bend", "named"), BAD)
def test_bad_parts_are_named(method: str, part: str, bend: Any, named: str) -> None:
    q, scales, zeros = random_parts(24, 64, 32, zero_from=int(method == "gptq"))
    parts = (pack_awq if method == "awq" else pack_gptq)(q, scales, zeros)
    parts[part] = bend(parts[part])
    with pytest.raises(ModelError, match=named) as caught:
        awq.unpack("x.proj", parts, 32) if method == "awq" else unpack_gptq(parts, 32)
    assert f"x.proj.{part}" in str(caught.value)


def test_inputs_that_groups_do_not_divide() -> None:
    q, scales, zeros = random_parts(8, 96, 32)
    with pytest.raises(ModelError, match="x of 96 inputs with group_size 64"):
        awq.unpack("x", pack_awq(q, scales, zeros), 64)
    with pytest.raises(ModelError, match=r"x\.proj of 96 inputs with group_size 128"):
        unpack_gptq(pack_gptq(q, scales, zeros + 1), 128)


def test_outputs_that_do_not_fill_words() -> None:
    parts = {
        "qweight": np.zeros((4, 12), np.int32),
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 12), np.float16),
    }
    with pytest.raises(ModelError, match=r"x\.proj of 12 outputs"):
        unpack_gptq(parts, 32)


def test_activation_order_is_refused() -> None:
    q, scales, zeros = random_parts(8, 64, 32, zero_from=1)
    parts = pack_gptq(q, scales, zeros)
    parts["g_idx"] = parts["g_idx"][::-1].copy()
    with pytest.raises(ModelError, match=r"x\.proj\.g_idx.*desc_act"):
        unpack_gptq(parts, 32)
    parts["g_idx"] = np.zeros(63, np.int32)
    with pytest.raises(ModelError, match=r"x\.proj\.g_idx of shape \[63\]"):
        unpack_gptq(parts, 32)


@pytest.mark.parametrize(("stored", "claimed"), [(2, 1), (1, 2)])
def test_a_symmetric_file_of_the_other_version_is_noticed(stored: int, claimed: int) -> None:
    q, scales, zeros = random_parts(8, 64, 32)
    zeros[:] = 8
    parts = pack_gptq(q, scales, zeros, version=stored)
    same(unpack_gptq(parts, 32, stored, symmetric=True), q, scales, zeros)
    with pytest.raises(ModelError, match=r"x\.proj\.qzeros.*sym.*checkpoint_format"):
        unpack_gptq(parts, 32, claimed, symmetric=True)
