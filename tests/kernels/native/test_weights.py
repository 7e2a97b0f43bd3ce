"""Packing: the values are those of the rounding that is specified, and what breaks its rules is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tokenloom.errors import ModelError  # noqa: E402
from tokenloom.kernels.builder import ProgramBuilder  # noqa: E402
from tokenloom.kernels.native.packed_forms import form_of  # noqa: E402
from tokenloom.kernels.native.sizes import form_bytes  # noqa: E402
from tokenloom.kernels.native.weights import INT4_GROUP, PackedTable, WeightPacker  # noqa: E402
from tokenloom.kernels.program import KVGeometry, Program  # noqa: E402
from tokenloom.quantization import round_to_nearest  # noqa: E402
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix  # noqa: E402

F32 = np.float32
BF16: Any = ml_dtypes.bfloat16
POOL = native.ThreadPool(2)
ROUNDED: dict[str, Any] = {"int8": round_to_nearest.int8, "int4": round_to_nearest.int4}


def pack(weight: np.ndarray, wanted: str, paired: bool = False) -> Any:
    raw = weight.view(np.uint16) if weight.dtype.itemsize == 2 else weight
    return native.pack(POOL, [raw], [weight.dtype.name], wanted, paired, 64 if wanted == "int4" else 0)


def unpacked(weight: Any) -> np.ndarray:
    out = np.empty(weight.shape, F32)
    for n, row in enumerate(out):
        weight.row(n, row)
    return out


def matrix(rows: int = 70, depth: int = 150) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, depth)).astype(F32)


def test_groups_of_both_rounders_are_equal() -> None:
    assert INT4_GROUP == round_to_nearest.DEFAULT_GROUP


# --- floats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [F32, np.float16, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (33, 149), (69, 63), (69, 128)])
def test_values_that_are_not_finite_cannot_be_rounded(
    wanted: str, dtype: Any, value: float, place: tuple[int, int]
) -> None:
    weight = matrix().astype(dtype)
    pack(weight, wanted)
    weight[place] = value
    with pytest.raises(ValueError, match="a value is not finite"):
        pack(weight, wanted)
    # Threads that stop early leave the pool as it was.
    assert pack(matrix().astype(dtype), wanted).shape == (70, 150)


@pytest.mark.parametrize("high", [1e6, 1e7, 3e38])
def test_groups_that_are_too_wide_for_their_scale(high: float) -> None:
    weight = matrix()
    weight[40, 100] = high
    with pytest.raises(ValueError, match="too wide for a scale in float16"):
        pack(weight, "int4")
    # One scale in float32 has no such limit.
    assert (unpacked(pack(weight, "int8")) == round_to_nearest.int8(weight).dequantize()).all()
    # Nor has the group while the step of its scale, rounded to float16, is finite.
    weight[40, 100] = 15 * 65504 - 10
    weight[40, 101:128] = weight[40, 64:100] = 0
    assert (unpacked(pack(weight, "int4")) == round_to_nearest.int4(weight).dequantize()).all()


numbers = st.floats(width=32) | st.floats(-2e6, 2e6, width=32) | st.sampled_from([F32(982799), F32(982800)])


@settings(max_examples=200)
@given(hnp.arrays(F32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=numbers))
@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_the_same_numbers_are_refused_as_by_the_specification(wanted: str, weight: np.ndarray) -> None:
    try:
        with np.errstate(over="ignore"):
            expected = ROUNDED[wanted](weight).dequantize()
    except ModelError:
        with pytest.raises(ValueError):
            pack(weight, wanted)
    else:
        assert (unpacked(pack(weight, wanted)) == expected).all()


def test_bfloat16_holds_what_is_not_finite_but_not_what_overflows() -> None:
    weight = matrix()
    weight[3, 5], weight[4, 0], weight[69, 149] = np.nan, np.inf, -np.inf
    weight[9, 9] = np.array(0x7F7F7FFF, np.uint32).view(F32)
    assert np.array_equal(unpacked(pack(weight, "bfloat16")), weight.astype(BF16).astype(F32), equal_nan=True)
    assert np.array_equal(unpacked(pack(weight, "float32")), weight, equal_nan=True)
    for bits in (0x7F7F8000, 0xFF7F8000, 0x7F7FFFFF):
        weight[9, 9] = np.array(bits, np.uint32).view(F32)
        with pytest.raises(ValueError, match="too large for bfloat16"):
            pack(weight, "bfloat16")
        assert unpacked(pack(weight, "float32"))[9, 9] == weight[9, 9]


# --- integers ----------------------------------------------------------------------------------------------


def int4_parts() -> dict[str, np.ndarray]:
    found = round_to_nearest.int4(matrix(70, 128), 32)
    return {"q": found.q, "scales": found.scales, "zeros": found.zeros}


def pack_int4(parts: dict[str, np.ndarray]) -> Any:
    scales = parts["scales"].view(np.uint16)
    return native.pack_quantized(POOL, [parts["q"]], [scales], [parts["zeros"]], False, 32)


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("q", (69, 127), 16, "outside the range"),
        ("q", (0, 0), 255, "outside the range"),
        ("zeros", (69, 3), 17, "outside the range"),
        ("zeros", (31, 0), 128, "outside the range"),
        ("scales", (5, 2), np.inf, "a scale is not finite"),
        ("scales", (69, 3), np.nan, "a scale is not finite"),
    ],
)
def test_integers_that_no_format_has(part: str, place: Any, value: float, message: str) -> None:
    parts = int4_parts()
    parts["q"][1, 1], parts["zeros"][1, 1] = 15, 16
    expected = Int4Matrix(**parts, group=32).dequantize()  # type: ignore[arg-type]
    assert (unpacked(pack_int4(parts)) == expected).all()
    parts[part][place] = value
    with pytest.raises(ValueError, match=message):
        pack_int4(parts)


def test_int8_of_a_file() -> None:
    """-128 among them, which rounding here never makes."""
    found = round_to_nearest.int8(matrix())
    q, scales = found.q.copy(), found.scales.copy()
    q[69, 149] = q[3, 0] = -128
    assert (
        unpacked(native.pack_quantized(POOL, [q], [scales], [None], False, 0))
        == Int8Matrix(q, scales).dequantize()
    ).all()
    scales[7] = np.inf
    with pytest.raises(ValueError, match="a scale is not finite"):
        native.pack_quantized(POOL, [q], [scales], [None], False, 0)


# --- tables ------------------------------------------------------------------------------------------------


def program() -> Program:
    """An embedding and a head."""
    builder = ProgramBuilder(KVGeometry(0, 1, 16), 70)
    builder.buffer("x", 48)
    builder.buffer("h", 48, "activation")
    builder.embed(builder.weight("table", 70, 48), "x")
    builder.rms_norm("x", builder.weight("norm", 48), "h", 1e-5)
    return builder.finish("h", builder.weight("head", 70, 48))


def table_of(dtype: str, roundings: dict[str, Any], *sources: Any) -> Any:
    own = program()
    spec = next(spec for spec in own.weights if spec.name == "table")
    return WeightPacker(own, dtype, POOL, roundings).pack(spec, sources)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [F32, np.float16, BF16])
def test_a_rounded_table_is_int8(stored: Any, dtype: str) -> None:
    values = matrix(70, 48).astype(stored)
    found = table_of(dtype, {"table": "int8"}, values)
    assert (found.format, found.paired) == ("int8", False)
    assert (unpacked(found) == round_to_nearest.int8(values).dequantize()).all()
    parts = (values[:30], values[30:])
    assert (table_of(dtype, {"table": "int8"}, *parts).data == found.data).all()


@pytest.mark.parametrize("stored", [F32, np.float16, BF16])
def test_a_table_is_kept_as_stored(stored: Any) -> None:
    values = matrix(70, 48).astype(stored)
    for sources in ([values], [values[:30], values[30:]]):
        found = table_of("float32", {}, *sources)
        assert isinstance(found, PackedTable)
        assert found.values.dtype == stored and found.values is not values
        assert (found.values == values).all()
    mixed = table_of("float32", {}, values[:30], values[30:].astype(F32))
    assert mixed.values.dtype == F32
    assert (mixed.values == values.astype(F32)).all()


def test_a_table_never_takes_more_than_the_arithmetic_needs() -> None:
    for stored in (np.float16, BF16):
        found = table_of("bfloat16", {}, matrix(70, 48).astype(stored))
        assert isinstance(found, PackedTable) and found.values.dtype.itemsize == 2
    values = matrix(70, 48)
    found = table_of("bfloat16", {}, values)
    assert found.format == "bfloat16"
    assert (unpacked(found) == values.astype(BF16).astype(F32)).all()


def test_a_table_in_integers_stays_there() -> None:
    found = round_to_nearest.int8(matrix(70, 48))
    packed = table_of("float32", {}, Int8Matrix(found.q, found.scales))
    assert (unpacked(packed) == found.dequantize()).all()


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (64, 64), (66, 65), (70, 7), (30, 150), (34, 128)])
def test_sizes_are_known_before_packing(shape: tuple[int, int], paired: bool) -> None:
    weight = matrix(*shape)
    for wanted in ("float32", "bfloat16", "int8", "int4"):
        packed = pack(weight, wanted, paired)
        assert form_bytes(form_of(packed)) == packed.nbytes
    for group in (32, 64, 128):
        found = round_to_nearest.int4(weight, group)
        parts = ([found.q], [found.scales.view(np.uint16)], [found.zeros])
        packed = native.pack_quantized(POOL, *parts, paired, group)
        assert form_bytes(form_of(packed)) == packed.nbytes
