"""The oracles against exact arithmetic, and the reference against the oracles (within rounding)."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.kernels import spec
from tokenloom.kernels.program import KVGeometry
from tokenloom.kernels.reference.gemm import PackedLinear
from tokenloom.kernels.reference.interpreter import _gelu_erf, _rms_norm, _silu_mul
from tokenloom.kernels.reference.kv_pool import KVPool
from tokenloom.kernels.reference.rounding import bfloat16_bits, from_bfloat16_bits, round_bfloat16
from tokenloom.kernels.reference.sampler import log_softmax

Float32 = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def round_to_fp32(value: Fraction) -> float:
    """Nearest fp32, ties to even, of a rational number in the normal range."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return float(round(value / unit) * unit)


def test_fma_rounds_once() -> None:
    a, b = normal(4000), normal(4000, seed=1)
    # Addends that nearly cancel the product or lie far below it are where a second rounding shows.
    scale = np.random.default_rng(2).choice([1.0, -1.0, 2.0**-24, 2.0**-30, 2.0**24], 4000)
    c = (-(a * b) * scale).astype(np.float32)
    found = spec.fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        assert result == round_to_fp32(Fraction(x) * Fraction(y) + Fraction(z))


def test_fma_where_rounding_twice_is_wrong() -> None:
    """(1 + x) (1 - x + x^2) = 1 + x^3 with x = 2^-12, so the sum lies just above a tie of fp32, but float64
    puts it on the tie."""
    a = np.array([2.0**-24 * (1 + 2.0**-12)], np.float32)
    b = np.array([1 - 2.0**-12 + 2.0**-24], np.float32)
    c = np.array([1.0], np.float32)
    twice = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    assert twice[0] == 1
    assert spec.fma(a, b, c)[0] == 1 + 2.0**-23


def test_dpbf16_order_and_denormals() -> None:
    big, small = np.float32(2.0**30), np.float32(1.0)
    # Odd element first: (big - big) + small keeps small, (small + big) - big would lose it.
    source = np.array([1, 1, 1, 1], np.float32)
    weight = np.array([[-big, big, 0, small]], np.float32)
    assert spec.linear_bf16(source, weight)[0] == small
    assert spec.linear_bf16(source, np.array([[small, big, 0, -big]], np.float32))[0] == 0
    denormal = np.array([2.0**-130], np.float32)
    assert spec.linear_bf16(denormal, np.array([[2.0**20]], np.float32))[0] == 0
    # A product below the normal range still takes part in the rounding of a sum.
    tiny = np.array([0, 2.0**-70], np.float32)
    below = np.array([[0, 2.0**-60]], np.float32)
    assert spec.linear_bf16(tiny, below)[0] == 0
    found = spec.linear_bf16(
        np.array([2.0**-70, 2.0**-60], np.float32), np.array([[2.0**-60, 2.0**-66]], np.float32)
    )
    assert found[0] == 2.0**-126 + 2.0**-130


def test_exp() -> None:
    x = np.linspace(-87.3, 88.7, 100001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(spec.exp(x) - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert error.max() < 2
    edges = spec.exp(np.array([0, -0.0, -np.inf, np.inf, -100, 100], np.float32))
    assert edges.tolist() == [1, 1, 0, np.inf, 0, np.inf]
    assert np.isnan(spec.exp(np.array([np.nan], np.float32)))[0]


def test_bfloat16_rounding_equals_ml_dtypes() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100000, np.uint64).astype(np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), np.array([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)]
    )
    values = values[np.abs(values) < 3.38e38]
    expected = values.astype(ml_dtypes.bfloat16)
    rounded = values.copy()
    round_bfloat16(rounded)
    assert (rounded.view(np.uint32) == expected.astype(np.float32).view(np.uint32)).all()
    assert (bfloat16_bits(values) == expected.view(np.uint16)).all()
    assert (from_bfloat16_bits(expected.view(np.uint16)) == expected.astype(np.float32)).all()
    assert np.isfinite(from_bfloat16_bits(bfloat16_bits(np.array([3.4e38, -3.4e38], np.float32)))).all()


@pytest.mark.parametrize(("columns", "depth"), [(64, 48), (101, 33), (7, 200), (1500, 300)])
def test_linear(columns: int, depth: int) -> None:
    source, weight = normal(8, depth), normal(columns, depth, seed=1)
    packed = PackedLinear(weight)
    out = np.empty((8, packed.padded_columns), np.float32)
    packed.multiply(source, out)
    for row in range(2):
        exact = source[row].astype(np.float64) @ weight.T.astype(np.float64)
        size = np.abs(source[row]).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
        expected = spec.linear_fp32(source[row], weight)
        assert (np.abs(expected - exact) <= depth * 2.0**-24 * size).all()
        assert (np.abs(out[row, :columns] - expected) <= depth * 2.0**-23 * size).all()


def test_linear_bf16() -> None:
    source, weight = normal(51), normal(20, 51, seed=1)
    round_bfloat16(source)
    round_bfloat16(weight)
    exact = source.astype(np.float64) @ weight.T.astype(np.float64)
    assert spec.linear_bf16(source, weight) == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_norm_rope_and_silu() -> None:
    x, weight = normal(3, 50), normal(50, seed=1)
    out = np.empty_like(x)
    _rms_norm(x, weight, np.float32(1e-5), out)
    for row in range(3):
        assert spec.rms_norm(x[row], weight, 1e-5) == pytest.approx(out[row], rel=1e-6)
    gate_up = normal(2, 60)
    gated = np.empty((2, 30), np.float32)
    _silu_mul(gate_up, gated)
    assert spec.silu_mul(gate_up[0, :30], gate_up[0, 30:]) == pytest.approx(gated[0], rel=2e-6, abs=1e-9)
    head, angle = normal(20), normal(8)
    turned = spec.rope(head, np.cos(angle), np.sin(angle))
    assert turned[16:].tolist() == head[16:].tolist()
    assert np.hypot(turned[:8], turned[8:16]) == pytest.approx(np.hypot(head[:8], head[8:16]), rel=1e-6)


def test_gelus() -> None:
    """Against float64: both forms everywhere, and the exact one relatively, down to where it is all tail."""
    x = np.concatenate([np.linspace(-13, 13, 4001), [0.0, -0.0, 1e-30, -1e-30]]).astype(np.float32)
    wide = x.astype(np.float64)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in wide])
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    assert spec.gelu(x) == pytest.approx(0.5 * wide * (1 + np.tanh(inner)), rel=1e-6, abs=5e-7)
    found = spec.gelu_erf(x)
    near = np.abs(x) < 4
    assert found[near] == pytest.approx(exact[near], rel=6e-7, abs=0)
    assert found == pytest.approx(exact, rel=5e-6, abs=1e-37)
    assert np.signbit(found[x == 0]).tolist() == np.signbit(x[x == 0]).tolist()
    assert _gelu_erf(x) == pytest.approx(exact, rel=5e-6, abs=1e-37)
    edges = np.array([np.inf, 3e38, -3e38, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert spec.gelu_erf(edges)[:3].tolist() == [np.inf, edges[1], 0]
        assert np.isnan(spec.gelu_erf(edges)[3])


def test_attention_oracle_is_softmax() -> None:
    query, keys, values = normal(24), normal(300, 24, seed=1), normal(300, 24, seed=2)
    for first in (0, 5, 130, 299):
        scores = keys[first:].astype(np.float64) @ query.astype(np.float64) * 0.2
        shares = np.exp(scores - scores.max())
        expected = (shares / shares.sum()) @ values[first:].astype(np.float64)
        assert spec.attention(query, keys, values, 0.2, first) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("first", [0, 5, 130, 299])
def test_narrow_attention_oracles_are_softmax(first: int) -> None:
    query, keys, values = normal(24), normal(300, 24, seed=1), normal(300, 24, seed=2)

    def softmax(stored_keys: Float32, stored_values: Float32) -> NDArray[np.float64]:
        scaled = spec.bf16(query * np.float32(0.2)).astype(np.float64)
        scores = stored_keys[first:].astype(np.float64) @ scaled
        shares = np.exp(scores - scores.max())
        result: NDArray[np.float64] = (shares / shares.sum()) @ stored_values[first:].astype(np.float64)
        return result

    # A share is rounded by 2^-9 of itself at most, so the result is by as much of the mean size of values.
    rounded = spec.stored_bf16(keys), spec.stored_bf16(values)
    found = spec.attention_bf16(query, *rounded, 0.2, first)
    assert found == pytest.approx(softmax(*rounded), abs=2e-3)
    narrow = [[spec.stored_int8(row) for row in side] for side in (keys, values)]
    integers = [np.stack([x for x, _ in side]) for side in narrow]
    scales = [np.array([scale for _, scale in side], np.float32) for side in narrow]
    found = spec.attention_int8(query, (integers[0], scales[0]), (integers[1], scales[1]), 0.2, first)
    expected = softmax(integers[0] * scales[0][:, None], integers[1] * scales[1][:, None])
    assert found == pytest.approx(expected, abs=2e-3)
    assert expected == pytest.approx(softmax(keys, values), abs=0.05)


def test_attention_oracles_give_no_negative_zero() -> None:
    query, keys, values = normal(8), normal(3, 8, seed=1), np.full((3, 8), -0.0, np.float32)
    for oracle in (spec.attention, spec.attention_bf16):
        assert not np.signbit(oracle(query, keys, values, 1.0)).any()


def test_what_a_pool_keeps() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-40, -2.5], np.float32)
    largest = np.finfo(np.float32).max
    assert spec.stored_fp32(odd).tolist() == [0, largest, -largest, odd[3], odd[4], -2.5]
    assert spec.stored_bf16(odd)[:4].tolist() == [
        0,
        2.0**128 - 2.0**120,
        2.0**120 - 2.0**128,
        2.0**128 - 2.0**120,
    ]
    values = np.array([127, -127, 0.5, 1.5, -0.4, 0], np.float32)
    rounded, scale = spec.stored_int8(values)
    assert rounded.tolist() == [127, -127, 0, 2, 0, 0]
    assert scale == 1
    rounded, scale = spec.stored_int8(np.zeros(4, np.float32))
    assert rounded.tolist() == [0] * 4
    assert scale == 1
    rounded, scale = spec.stored_int8(odd)
    assert np.isfinite(rounded).all() and np.isfinite(scale)
    # What is too small for a scale of its own.
    assert spec.stored_int8(np.array([1e-45], np.float32))[1] == 1


def test_log_sum_exp() -> None:
    logits = normal(2500) * 5
    exact = np.log(np.exp(logits.astype(np.float64)).sum())
    best, rest = spec.log_sum_exp(logits)
    assert float(best) + float(rest) == pytest.approx(exact, rel=1e-6)
    reference = log_softmax(logits[None])[0]
    for token in (0, 7, int(np.argmax(logits))):
        assert spec.logprob(logits, token) == pytest.approx(logits[token] - exact, abs=3e-6)
        assert reference[token] == pytest.approx(logits[token] - exact, abs=3e-6)


def test_pool_refuses_pages_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        KVPool(KVGeometry(1, 1, 8), "float32", num_frames=1, frame_bytes=1000, pages_per_frame=1)
