"""Products of packed weights, bit for bit against the oracle, on every instruction set of the machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.kernels import spec
from tokenloom.quantization import round_to_nearest

_native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native module is not built")

ISAS = _native.isas()
SHAPES = [(1, 1, 1), (2, 33, 31), (3, 64, 65), (5, 7, 96), (13, 50, 40), (40, 19, 70)]
"""(rows, depth, columns)"""


def bf16(values: Any) -> NDArray[np.uint16]:
    """Bits of fp32 values rounded to bfloat16."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(np.asarray(values, np.float32)), quiet, rounded)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def numbers(rng: np.random.Generator, *shape: int, spread: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers times random powers of two up to 2^spread."""
    scale = np.exp2(rng.uniform(-spread, spread, shape))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def product(x: NDArray[np.float32], weight: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    oracle = spec.linear_fp32 if name == "f32" else spec.linear_bf16
    return np.stack([oracle(row, weight) for row in x])


def source_of(x: NDArray[np.float32], name: str) -> NDArray[Any]:
    return x if name == "f32" else bf16(x)


def assert_same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    kind = np.uint32 if found.dtype == np.float32 else found.dtype
    np.testing.assert_array_equal(found.view(kind), expected.view(kind))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_product_is_the_oracle(isa: str, name: str, rows: int, depth: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    x, weight = numbers(rng, rows, depth, spread=8), numbers(rng, columns, depth, spread=8)
    if name == "bf16":
        x, weight = widen(bf16(x)), widen(bf16(weight))
    packed = _native.PackedLinear([weight], name)
    out = np.full((rows, columns), np.nan, np.float32)
    packed.linear(source_of(x, name), out, isa)
    assert_same(out, product(x, weight, name))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("exponent", [-126, -140, 127])
def test_product_at_the_ends_of_the_range(isa: str, name: str, exponent: int) -> None:
    """Sums that become denormal, or that overflow."""
    rng = np.random.default_rng(5)
    half = exponent // 2
    x = np.ldexp(numbers(rng, 4, 9, spread=3), half).astype(np.float32)
    weight = np.ldexp(numbers(rng, 40, 9, spread=3), exponent - half).astype(np.float32)
    if name == "bf16":
        x, weight = widen(bf16(x)), widen(bf16(weight))
    out = np.empty((4, 40), np.float32)
    _native.PackedLinear([weight], name).linear(source_of(x, name), out, isa)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = product(x, weight, name)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    assert_same(np.nan_to_num(out, nan=0), np.nan_to_num(expected, nan=0))


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_results_around_the_smallest_normal_number(isa: str) -> None:
    """2^-126 less a product in every place where denormal rounding and rounding to 24 bits differ."""
    exponents = np.arange(-30, -20)
    small = np.concatenate(
        [np.ldexp(s * np.arange(128, 256, dtype=np.float32), e - 7) for e in exponents for s in (1, -1)]
    )
    x = np.array([[2.0**-63, 2.0**-63, 0, 2.0**-63 * 1.5]], np.float32)
    weight = np.zeros((len(small), 4), np.float32)
    weight[:, 1] = 2.0**-63 * np.where(np.arange(len(small)) % 3, 1, -1)
    weight[:, 0] = small * np.float32(2.0**-63)
    weight[:, 2] = small
    weight = widen(bf16(weight))
    out = np.empty((1, len(small)), np.float32)
    _native.PackedLinear([weight], "bf16").linear(bf16(x), out, isa)
    expected = product(x, weight, "bf16")
    assert_same(out, expected)
    assert (expected == 0).any() and (np.abs(expected) == np.float32(2.0**-126)).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "bf16", "i8", "i4"])
def test_a_row_does_not_see_its_neighbours(isa: str, name: str) -> None:
    rng = np.random.default_rng(7)
    depth, columns = 200, 100
    weight = numbers(rng, columns, depth)
    packed = _native.PackedLinear([weight], name, group=32 if name == "i4" else 0)
    x = source_of(numbers(rng, 61, depth), name)
    alone = np.concatenate([_run(packed, x[i : i + 1], isa) for i in range(len(x))])
    for rows in [*range(2, 28), 40, 61]:
        assert_same(_run(packed, x[:rows], isa), alone[:rows])


def _run(packed: Any, x: NDArray[Any], isa: str, **kwargs: Any) -> NDArray[np.float32]:
    out = np.full((len(x), packed.n), np.nan, np.float32)
    packed.linear(x, out, isa, **kwargs)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_many_rows_and_a_deep_weight(isa: str, name: str) -> None:
    """More rows than one block, and a depth that is cut: sums are stored and continued."""
    rng = np.random.default_rng(8)
    depth, columns, rows = 2303, 33, 499
    packed = _native.PackedLinear([numbers(rng, columns, depth)], name)
    x = source_of(numbers(rng, rows, depth), name)
    together = _run(packed, x, isa)
    for row in (0, 1, 250, 479, 480, 498):
        assert_same(together[row : row + 1], _run(packed, x[row : row + 1], "portable"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize(
    "epilogue", ["none", "residual", "scaled residual", "silu_mul", "gelu_mul", "gelu", "gelu_erf", "relu"]
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("columns", [36, 70, 128])
def test_epilogues(isa: str, name: str, epilogue: str, has_bias: bool, columns: int) -> None:
    rng = np.random.default_rng(columns)
    rows, depth = 5, 11
    x, weight = widen(bf16(numbers(rng, rows, depth))), widen(bf16(numbers(rng, columns, depth)))
    bias = numbers(rng, columns) if has_bias else None
    y = product(x, weight, name)
    y = y if bias is None else y + bias
    paired = epilogue in ("silu_mul", "gelu_mul")
    packed = _native.PackedLinear([weight], name, paired=paired)
    width = columns // 2 if paired else columns
    before = numbers(rng, rows, width)
    scale = 0.7 if epilogue == "scaled residual" else 1.0
    epilogue = epilogue.removeprefix("scaled ")
    if epilogue == "residual":
        y = before + y * np.float32(scale)
    elif epilogue == "silu_mul":
        y = spec.silu_mul(y[:, :width], y[:, width:])
    elif epilogue == "gelu_mul":
        y = spec.gelu(y[:, :width]) * y[:, width:]
    elif epilogue == "gelu":
        y = spec.gelu(y)
    elif epilogue == "gelu_erf":
        y = spec.gelu_erf(y)
    elif epilogue == "relu":
        y = np.maximum(y, np.float32(0))
    wide = np.full((rows, width + 9), 7, np.float32)
    wide[:, :width] = before
    packed.linear(source_of(x, name), wide[:, :width], isa, bias, epilogue, scale)
    assert_same(wide[:, :width].copy(), y)
    assert (wide[:, width:] == 7).all()
    if epilogue != "residual":
        narrow = np.full((rows, width + 9), 7, np.uint16)
        packed.linear(source_of(x, name), narrow[:, :width], isa, bias, epilogue, scale)
        assert_same(narrow[:, :width].copy(), bf16(y))
        assert (narrow[:, width:] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
def test_panels_may_be_split_anywhere(isa: str) -> None:
    rng = np.random.default_rng(11)
    weight, x = numbers(rng, 7 * 32 - 5, 20), bf16(numbers(rng, 2, 20))
    packed = _native.PackedLinear([weight], "bf16")
    whole = _run(packed, x, isa)
    for cut in range(packed.panels + 1):
        out = np.full_like(whole, np.nan)
        packed.linear(x, out, isa, end=cut)
        assert np.isnan(out[:, cut * 32 :]).all()
        packed.linear(x, out, isa, begin=cut)
        assert_same(out, whole)


def test_stacked_sources_of_all_types_and_strides() -> None:
    rng = np.random.default_rng(12)
    parts = [numbers(rng, rows, 21) for rows in (5, 40, 3)]
    sources = [parts[0], parts[1].astype(np.float16), bf16(parts[2])]
    exact = np.concatenate([parts[0], sources[1].astype(np.float32), widen(sources[2])])
    for name, expected in (("f32", exact), ("bf16", widen(bf16(exact)))):
        for views in (
            sources,
            [np.asfortranarray(s) for s in sources],
            [np.repeat(s, 2, 1)[:, ::2] for s in sources],
        ):
            packed = _native.PackedLinear(views, name)
            found = np.stack([packed.unpack(row) for row in range(48)])
            assert_same(found, expected)


def test_float16_sources_are_exact() -> None:
    every = np.arange(0, 0x10000, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(64, -1)
    packed = _native.PackedLinear([finite], "f32")
    for row in (0, 1, 31, 32, 63):
        assert_same(packed.unpack(row), finite[row].astype(np.float32))


def quantized(weight: NDArray[np.float32], name: str, group: int) -> Any:
    """The oracle's matrix and its product with one quantised row."""
    if name == "i8":
        eight = round_to_nearest.int8(weight)
        return eight, lambda q, scale: spec.linear_int8(q, scale, eight.q, eight.scales)
    four = round_to_nearest.int4(weight, group)
    return four, lambda q, scale: spec.linear_int4(q, scale, four.q, four.scales, four.zeros, group)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source", ["f32", "bf16"])
@pytest.mark.parametrize(("name", "group"), [("i8", 0), ("i4", 32), ("i4", 64), ("i4", 128)])
@pytest.mark.parametrize(("rows", "depth", "columns"), [*SHAPES, (4, 200, 33), (26, 300, 31)])
def test_integer_products_are_the_oracle(
    isa: str, source: str, name: str, group: int, rows: int, depth: int, columns: int
) -> None:
    rng = np.random.default_rng(depth)
    weight, x = numbers(rng, columns, depth, spread=3), numbers(rng, rows, depth, spread=3)
    x[0] *= np.float32(2.0**-120)
    if rows > 2:
        x[1], x[2] = 0, x[2] * np.float32(2.0**110)
    x = widen(bf16(x)) if source == "bf16" else x
    _, oracle = quantized(weight, name, group)
    packed = _native.PackedLinear([weight], name, group=group)
    rows_q = [spec.quantize_row(row) for row in x]
    values, scales, sums = packed.quantize(source_of(x, source), isa)
    assert_same(values, np.stack([q for q, _ in rows_q]))
    assert_same(scales, np.array([scale for _, scale in rows_q]))
    starts = np.arange(0, depth, group or depth)
    np.testing.assert_array_equal(sums, np.add.reduceat(values.astype(np.int32), starts, axis=1))
    assert_same(_run(packed, source_of(x, source), isa), np.stack([oracle(q, scale) for q, scale in rows_q]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["i8", "i4"])
@pytest.mark.parametrize("epilogue", ["none", "residual", "silu_mul"])
def test_integer_epilogues(isa: str, name: str, epilogue: str) -> None:
    rng = np.random.default_rng(21)
    rows, depth, columns = 14, 96, 76
    x, weight = bf16(numbers(rng, rows, depth)), numbers(rng, columns, depth)
    bias = numbers(rng, columns)
    _, oracle = quantized(weight, name, 32)
    y = np.stack([oracle(*spec.quantize_row(row)) for row in widen(x)]) + bias
    packed = _native.PackedLinear([weight], name, paired=epilogue == "silu_mul", group=32)
    width = columns // 2 if epilogue == "silu_mul" else columns
    out = numbers(rng, rows, width)
    if epilogue == "residual":
        y = out + y
    elif epilogue == "silu_mul":
        y = spec.silu_mul(y[:, :width], y[:, width:])
    packed.linear(x, out, isa, bias, epilogue)
    assert_same(out, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["i8", "i4"])
def test_the_largest_integers_do_not_saturate(isa: str, name: str) -> None:
    depth, columns = 4096, 32
    signs = np.where(np.arange(columns) % 2, -1, 1).astype(np.float32)[:, None]
    weight = np.broadcast_to(signs, (columns, depth)).copy()
    x = np.stack([np.ones(depth, np.float32), -np.ones(depth, np.float32)])
    _, oracle = quantized(weight, name, 128)
    packed = _native.PackedLinear([weight], name, group=128)
    assert_same(_run(packed, x, isa), np.stack([oracle(*spec.quantize_row(row)) for row in x]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["i8", "i4"])
def test_a_broken_row_is_garbage_alone(isa: str, name: str) -> None:
    rng = np.random.default_rng(23)
    x = numbers(rng, 5, 70)
    packed = _native.PackedLinear([numbers(rng, 40, 70)], name, group=32)
    whole = _run(packed, x, isa)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, -np.inf
    values, scales, _ = packed.quantize(x, isa)
    for row in range(5):
        q, scale = spec.quantize_row(x[row])
        assert_same(values[row], q)
        assert_same(scales[row : row + 1], np.array([scale]))
    broken = _run(packed, x, isa)
    for row in (0, 4):
        assert_same(broken[row], whole[row])


@pytest.mark.parametrize("source", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("name", "group"), [("i8", 0), ("i4", 32), ("i4", 64), ("i4", 128)])
def test_rounding_of_weights_is_the_oracle(source: str, name: str, group: int) -> None:
    """Unpacked rows of a weight rounded at load equal the canonical arrays, and so does a weight made of
    them."""
    rng = np.random.default_rng(31)
    weight = numbers(rng, 70, 203, spread=2)
    weight[3], weight[4] = 0, np.abs(weight[4])
    weight[5] *= np.float32(2.0**-14)
    weight[6] = np.float32(2.0**-24) * (np.arange(203) % 3)
    stored: NDArray[Any] = weight
    if source == "bf16":
        stored, weight = bf16(weight), widen(bf16(weight))
    elif source == "f16":
        stored = weight.astype(np.float16)
        weight = stored.astype(np.float32)
    canonical, _ = quantized(weight, name, group)
    if name == "i8":
        expected = canonical.q * canonical.scales[:, None]
        again = _native.PackedLinear([canonical.q], "i8", scales=[canonical.scales])
    else:
        spread = [np.repeat(a, group, axis=1)[:, :203] for a in (canonical.scales, canonical.zeros)]
        expected = (canonical.q.astype(np.int32) - spread[1]).astype(np.float32) * spread[0].astype(
            np.float32
        )
        again = _native.PackedLinear(
            [canonical.q], "i4", group=group, scales=[canonical.scales], zeros=[canonical.zeros]
        )
    packed = _native.PackedLinear([stored[:9], stored[9:]], name, group=group)
    for row in range(70):
        assert_same(packed.unpack(row), expected[row])
        assert_same(again.unpack(row), expected[row])


@pytest.mark.parametrize("isa", ISAS)
def test_zero_points_may_be_sixteen(isa: str) -> None:
    rng = np.random.default_rng(33)
    q = rng.integers(0, 16, (40, 70), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.1, (40, 3)).astype(np.float16)
    zeros = rng.integers(0, 17, (40, 3), dtype=np.uint8)
    packed = _native.PackedLinear([q], "i4", group=32, scales=[scales], zeros=[zeros])
    x = numbers(rng, 3, 70)
    expected = np.stack([spec.linear_int4(*spec.quantize_row(row), q, scales, zeros, 32) for row in x])
    assert_same(_run(packed, x, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [70, 4096])
def test_int8_may_be_minus_128(isa: str, depth: int) -> None:
    rng = np.random.default_rng(34)
    q = rng.integers(-128, 128, (40, depth), dtype=np.int8)
    q[7], q[8] = -128, 127
    scales = rng.uniform(0.001, 0.1, 40).astype(np.float32)
    packed = _native.PackedLinear([q], "i8", scales=[scales])
    x = numbers(rng, 3, depth)
    x[2] = np.abs(x[2]).max()
    expected = np.stack([spec.linear_int8(*spec.quantize_row(row), q, scales) for row in x])
    assert_same(_run(packed, x, isa), expected)


def _ones() -> tuple[list[Any], list[Any]]:
    return [np.ones((8, 1), np.float16)], [np.ones((8, 1), np.uint8)]


def test_what_does_not_fit_is_refused() -> None:
    weight = np.zeros((8, 4), np.float32)
    packed = _native.PackedLinear([weight], "bf16")
    x, out = np.zeros((2, 4), np.uint16), np.zeros((2, 8), np.float32)
    bad: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("x", (x[:, :3], out), {}),
        ("x", (x.astype(np.float32), out), {}),
        ("x", (x.astype(np.int64), out), {}),
        ("out", (x, out[:1]), {}),
        ("out", (x, out[:, :7]), {}),
        ("out", (x, out.astype(np.float64)), {}),
        ("out", (x, np.zeros((2, 16), np.float32)[:, ::2]), {}),
        ("out", (x, np.zeros((2, 8), np.uint16)), {"epilogue": "residual"}),
        ("epilogue", (x, out), {"epilogue": "silu_mul"}),
        ("epilogue", (x, out), {"epilogue": "swish"}),
        ("bias", (x, out), {"bias": np.zeros(7, np.float32)}),
        ("begin", (x, out), {"begin": -1}),
        ("end", (x, out), {"end": 2}),
        ("instruction set", (x, out), {"isa": "mmx"}),
    ]
    for name, args, kwargs in bad:
        with pytest.raises(ValueError, match=name):
            packed.linear(*args, **kwargs)
    for args, message in (
        (([], "f32"), "empty"),
        (([weight], "f64"), "format"),
        (([weight, weight[:, :3]], "f32"), "depth"),
        (([weight[:3]], "f32", True), "even"),
        (([weight.astype(np.int64)], "f32"), "sources"),
        (([weight.astype(np.int8)], "i8"), "scales"),
        (([weight.astype(np.int8)], "f32", False, 0, [np.zeros(8, np.float32)]), "integers"),
        (([weight], "i4", False, 12), "group"),
        (([weight.astype(np.uint8)], "i4", False, 8, [np.ones((8, 1), np.float16)]), "zeros"),
        (([weight.astype(np.uint8) + 16], "i4", False, 8, *_ones()), "15"),
        (([weight.astype(np.uint8)], "i4", False, 8, _ones()[0], [np.full((8, 1), 17, np.uint8)]), "16"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.PackedLinear(*args)
    with pytest.raises(ValueError, match="row"):
        packed.unpack(8)
