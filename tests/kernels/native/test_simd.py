"""Every vector operation, on every instruction set, against the portable one, which is the readable definition;
and the functions built of them against their oracles."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.kernels import spec

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native module is not built")

Words = NDArray[np.int32]
Float32 = NDArray[np.float32]
OTHERS = [isa for isa in native.isas() if isa != "portable"]
COUNT = 3000

SPECIAL = np.array(
    [
        0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 2.0**-126, -(2.0**-126), 2.0**-127, 3.4028235e38,
        -3.4028235e38, 0.5, 1.5, 2.5, -0.5, -2.5, 8388607.5, 16777216.0, 2147483648.0, -2147483648.0, 2147483520.0, 3e9,
        -87.33654, -87.336548, -87.33655, 88.72283, 88.722839, 88.72284, -103.0, 0.625, 0.62499994, -0.625, 44.3,
        2.0**-63, 2.0**64, 65504.0, 6e-8,
    ],
    np.float32,
)  # fmt: skip
FLOAT_RESULTS = {
    "zero", "set", "load", "load_part", "add", "sub", "mul", "div", "fma", "max", "min", "round_even", "select",
    "select_mask", "to_float", "load_bf16", "load_bf16_part", "load_f16", "dot_bf16", "sum", "max_lane", "exp", "tanh",
    "silu_mul", "gelu_erf", "scale_by_power", "store", "store_part",
}  # fmt: skip


def float_words(rng: np.random.Generator) -> Words:
    """Random bits, ordinary numbers and special ones, mixed within a vector."""
    values = (rng.standard_normal((COUNT, 16)) * 2.0 ** rng.integers(-20, 20, (COUNT, 16))).astype(np.float32)
    wild = rng.integers(-(2**31), 2**31, (COUNT, 16)).astype(np.int32).view(np.float32)
    special = rng.choice(SPECIAL, (COUNT, 16))
    kind = rng.integers(0, 3, (COUNT, 16))
    return np.choose(kind, [values, wild, special]).astype(np.float32).view(np.int32)


def with_few_bits(rng: np.random.Generator) -> Words:
    """Pairs of bf16 numbers, many of them denormal or with products around 2^-126."""
    exponents = rng.choice([0, 1, 2, 62, 63, 64, 65, 100, 127, 160], (COUNT, 32))
    halves = rng.integers(0, 2, (COUNT, 32)) << 15 | exponents << 7 | rng.integers(0, 128, (COUNT, 32))
    return halves.astype(np.uint16).view(np.int32)


def arguments(name: str, rng: np.random.Generator) -> tuple[Words, Words, Words]:
    a, b, c = float_words(rng), float_words(rng), float_words(rng)
    if name in ("load_part", "store_part", "load_bf16_part", "store_high_part"):
        b[:, 0] = rng.integers(0, 17, COUNT)
    elif name == "first":
        a[:, 0] = rng.integers(0, 17, COUNT)
    elif name == "dot_bf16":
        b, c = with_few_bits(rng), with_few_bits(rng)
        small = rng.random((COUNT, 16)) < 0.5
        tiny = (rng.integers(0, 2, (COUNT, 16)) << 31 | rng.integers(0, 2**25, (COUNT, 16))).astype(np.int32)
        a = np.where(small, tiny, a).astype(np.int32)
    elif name == "dot_u8s8":
        a >>= 2  # an accumulator that overflows is nobody's
    elif name == "isum":
        a >>= 4
    elif name == "scale_by_power":
        b[:] = rng.integers(-126, 128, b.shape).astype(np.float32).view(np.int32)
    elif name == "store_bf16_flushed":
        a.view(np.float32)[np.isnan(a.view(np.float32))] = 0.5  # for numbers only
    elif name == "max_lane":
        # Which zero and which NaN a maximum over lanes gives is left open.
        values = a.view(np.float32)
        values[np.isnan(values) | (values == 0)] = 1
    return a, b, c


def comparable(name: str, out: Words) -> Words:
    """With one NaN: payloads are not specified."""
    if name in FLOAT_RESULTS:
        values = out.view(np.float32)
        out[np.isnan(values)] = 0x7FC00000
    return out


@pytest.mark.parametrize("isa", OTHERS)
@pytest.mark.parametrize("name", native.simd_ops())
def test_equals_the_portable_operation(name: str, isa: str) -> None:
    a, b, c = arguments(name, np.random.default_rng(len(name)))
    expected = comparable(name, native.simd_apply(name, a, b, c, "portable"))
    found = comparable(name, native.simd_apply(name, a, b, c, isa))
    differs = np.flatnonzero((found != expected).any(axis=1))
    assert len(differs) == 0, (
        a[differs[0]],
        b[differs[0]],
        c[differs[0]],
        found[differs[0]],
        expected[differs[0]],
    )


def finite_words(rng: np.random.Generator) -> Words:
    words = float_words(rng)
    values = words.view(np.float32)
    values[np.isnan(values)] = 0
    return words


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("name", ["exp", "tanh", "fma", "silu_mul", "gelu_erf"])
def test_equals_the_oracle(name: str, isa: str) -> None:
    rng = np.random.default_rng(3)
    words = [finite_words(rng) for _ in range(3)]
    x, y, z = (w.view(np.float32) for w in words)
    with np.errstate(all="ignore"):
        expected = {
            "exp": lambda: spec.exp(x),
            "tanh": lambda: spec.tanh(x),
            "fma": lambda: spec.fma(x, y, z),
            "silu_mul": lambda: spec.silu_mul(x, y),
            "gelu_erf": lambda: spec.gelu_erf(x),
        }[name]()
    found = comparable(name, native.simd_apply(name, *words, isa)[:, :16])
    assert (found == comparable(name, np.ascontiguousarray(expected).view(np.int32))).all()


@pytest.mark.parametrize("isa", native.isas())
def test_dot_bf16_is_two_flushed_steps(isa: str) -> None:
    rng = np.random.default_rng(4)
    acc, a, b = arguments("dot_bf16", rng)
    with np.errstate(all="ignore"):
        total = spec.flush(acc.view(np.float32))
        for shift in (0, 16):  # the upper halves are the odd elements
            x = spec.flush(((a << shift) & -65536 if shift else a & -65536).view(np.float32))
            y = spec.flush(((b << shift) & -65536 if shift else b & -65536).view(np.float32))
            total = spec.fma_flushed(x, y, total)
    found = comparable("dot_bf16", native.simd_apply("dot_bf16", acc, a, b, isa)[:, :16])
    expected = comparable("dot_bf16", np.ascontiguousarray(total, np.float32).view(np.int32))
    assert (found == expected).all()


def test_refuses_bad_arguments() -> None:
    words = np.zeros((2, 16), np.int32)
    with pytest.raises(ValueError, match="name"):
        native.simd_apply("sqrt", words, words, words)
    with pytest.raises(ValueError, match="a, b, c"):
        native.simd_apply("add", words, words[:1], words)
    with pytest.raises(ValueError, match="a, b, c"):
        native.simd_apply("add", words, words, np.zeros((2, 8), np.int32))
