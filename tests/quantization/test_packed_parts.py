"""AWQ and GPTQ parts against packers written from the formats, and parts that are wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.quantization.packers import pack_awq, pack_gptq, random_parts
from tokenloom.errors import ModelError
from tokenloom.quantization import awq, gptq
from tokenloom.quantization.awq import AwqLinear
from tokenloom.quantization.gptq import GptqLinear
from tokenloom.quantization.linear_format import unpack_linear
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix

SHAPES = [(8, 32, 32), (16, 64, 32), (24, 128, 64), (40, 256, 128), (8, 384, 128)]


def unpack_gptq(
    parts: dict[str, np.ndarray], group: int, version: int = 1, symmetric: bool = False, bits: int = 4
) -> Any:
    stored = GptqLinear(group=group, bits=bits, zero_offset=int(version == 1), symmetric=symmetric)
    return unpack_linear(stored, "x.proj", parts)


def unpack_awq(parts: dict[str, np.ndarray], group: int) -> Any:
    return unpack_linear(AwqLinear(group), "x.proj", parts)


def shapes(parts: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: part.shape for name, part in parts.items()}


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
    assert AwqLinear(group).shape("x", shapes(parts)) == (rows, depth)
    same(unpack_awq(parts, group), q, scales, zeros)


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
    assert GptqLinear(group=group).shape("x", shapes(parts)) == (rows, depth)
    same(unpack_gptq(parts, group, version), q, scales, zeros)


def test_one_word_by_hand() -> None:
    """Bits spelled out: nibbles of 0x76543210 are 0, 1, ... 7 from the low end."""
    word = np.full((32, 1), 0x76543210, np.int32)
    parts = {"qweight": word, "qzeros": word[:1], "scales": np.ones((1, 8), np.float16)}
    matrix = unpack_awq(parts, 32)
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
    same(unpack_awq(parts | {"scales": parts["scales"].astype(dtype)}, 32), q, exact, zeros)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_that_float16_does_not_hold(dtype: Any) -> None:
    q, scales, zeros = random_parts(8, 64, 32)
    parts = pack_awq(q, scales, zeros)
    wide = np.geomspace(1e-12, 6e4, scales.size).astype(dtype).reshape(parts["scales"].shape)
    found = unpack_awq(parts | {"scales": wide}, 32).scales.astype(np.float64)
    wanted = wide.T.astype(np.float64)
    assert (np.abs(found - wanted) <= np.maximum(wanted * 2.0**-11, 2.0**-25)).all()
    assert (np.abs(found - wanted) > 0).any()
    wide[1, 3] = 7e4
    with pytest.raises(ModelError, match=r"x\.proj\.scales with the value 70"):
        unpack_awq(parts | {"scales": wide}, 32)


@pytest.mark.parametrize(("stored", "held"), [(0, 128), (96, 32), (192, 64), (256, 128)])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_other_groups_are_held_in_smaller_ones(method: str, stored: int, held: int) -> None:
    depth = 768 if stored else 200
    q, scales, zeros = random_parts(16, depth, stored or depth, zero_from=int(method == "gptq"))
    if method == "awq":
        found = unpack_awq(pack_awq(q, scales, zeros), stored)
    else:
        found = unpack_gptq(pack_gptq(q, scales, zeros), stored)
    assert found.group == held
    groups = np.arange(depth) // (stored or depth)
    steps = q.astype(np.float32) - zeros[:, groups]
    assert (found.dequantize() == steps * scales[:, groups].astype(np.float32)).all()


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
        unpack_awq(parts, 32) if method == "awq" else unpack_gptq(parts, 32)
    assert f"x.proj.{part}" in str(caught.value)


def test_inputs_that_groups_do_not_divide() -> None:
    q, scales, zeros = random_parts(8, 96, 32)
    with pytest.raises(ModelError, match=r"x\.proj of 96 inputs with group_size 64"):
        unpack_awq(pack_awq(q, scales, zeros), 64)
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


def gptq_values(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(q - zero) * scale with the zero and scale of each input's group, as the format defines them."""
    return (q.astype(np.float32) - zeros[:, groups]) * scales[:, groups].astype(np.float32)


@pytest.mark.parametrize("group", [32, 64, 96])
def test_activation_order(group: int) -> None:
    q, scales, zeros = random_parts(16, 192, group, zero_from=1)
    groups = np.random.default_rng(3).permutation(np.arange(192) // group).astype(np.int32)
    parts = pack_gptq(q, scales, zeros) | {"g_idx": groups}
    order = GptqLinear(group=group).input_order("x.proj", groups)
    assert order is not None
    assert sorted(order) == list(range(192))
    wanted = gptq_values(q, scales, zeros, groups)
    found = unpack_gptq(parts, group).dequantize()
    assert (found == wanted[:, order]).all()
    x = np.random.default_rng(4).integers(-8, 8, (5, 192)).astype(np.float64)
    assert np.allclose(x[:, order] @ found.T, x @ wanted.T, rtol=1e-12, atol=1e-12)


BAD_ORDERS = [
    (lambda g: np.where(np.arange(64) == 5, 2, g), r"groups from 0 to 2.*groups from 0 to 1"),
    (lambda g: np.where(np.arange(64) == 5, -1, g), r"groups from -1"),
    (lambda g: np.where(np.arange(64) == 5, np.iinfo(np.int32).max, g), r"groups from 0 to 2147483647"),
    (lambda g: np.where(np.arange(64) == 5, 1, g), r"groups of different sizes"),
    (lambda g: np.full(64, -1), r"groups from -1"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("bend", "named"), BAD_ORDERS)
def test_orders_that_cannot_be(bend: Any, named: str, bits: int) -> None:
    q, scales, zeros = random_parts(8, 64, 32, zero_from=1)
    parts = pack_gptq(q, scales, zeros, bits=bits)
    parts["g_idx"] = bend(parts["g_idx"]).astype(np.int32)
    with pytest.raises(ModelError, match=r"x\.proj\.g_idx with " + named):
        unpack_gptq(parts, 32, bits=bits)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("shuffle", [True, False])
def test_gptq_in_8_bits(group: int, version: int, shuffle: bool) -> None:
    rng = np.random.default_rng(0)
    _, scales, _ = random_parts(16, 64, group or 64)
    q = rng.integers(0, 256, (16, 64)).astype(np.uint8)
    zeros = rng.integers(version == 1, 256, scales.shape)
    parts = pack_gptq(q, scales, zeros, version=version, bits=8)
    groups = np.arange(64) // (group or 64)
    if shuffle:
        groups = rng.permutation(groups)
        parts["g_idx"] = groups.astype(np.int32)
    found = unpack_gptq(parts, group, version, bits=8)
    assert found.dtype == np.float32
    assert (found == gptq_values(q, scales, zeros, groups)).all()
    zeros[:] = 128
    parts = pack_gptq(q, scales, zeros, version=version, bits=8)
    found = unpack_gptq(parts, group, version, symmetric=True, bits=8)
    values = found if group else found.dequantize()
    assert isinstance(found, np.ndarray if group else Int8Matrix)
    assert (values == gptq_values(q, scales, zeros, np.arange(64) // (group or 64))).all()
    parts["qzeros"][0, 0] ^= 2
    if not group:
        with pytest.raises(ModelError, match=r"x\.proj\.qzeros with other zeros than 128"):
            unpack_gptq(parts, group, version, symmetric=True, bits=8)


def test_an_order_of_another_shape() -> None:
    q, scales, zeros = random_parts(8, 64, 32, zero_from=1)
    parts = pack_gptq(q, scales, zeros)
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
