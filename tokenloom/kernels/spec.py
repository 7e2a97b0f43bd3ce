"""The exact oracles: what each op computes, addition by addition.

Slow on purpose: numpy runs along the outputs only, and every sum is a Python loop in the order of the
numerics contract. A native op must equal these bits on every instruction set. The numpy reference has its own
numerics id and agrees within rounding.

What the order is made of, and why each machine can follow it:

* fp32 sums of products are chains of fused multiply-adds, one accumulator per output, over K in order. AVX2
  with FMA, AVX-512 and NEON have the instruction; elsewhere C's fmaf is exact, if slow.
* bf16 sums of products run over pairs, the odd element first, each a fused multiply-add whose denormal inputs
  and results count as zero; the product itself is never flushed. A result is denormal if it is below 2^-126
  after rounding to 24 bits with an unbounded exponent, as SSE's flush to zero has it. This is what VDPBF16PS
  does (checked on hardware with products and results around the underflow threshold). A multiplication and an
  addition, each with flushed denormals, differ from it only where a product is below 2^-126.
* Sums without products (softmax denominators, squares) run in 16 lanes, element i in lane i mod 16, and the
  lanes are then folded: i and i + 8, then i and i + 4, i + 2, i + 1.
* Division and square root are IEEE. exp and log are the functions given here. No other contraction of a
  multiplication and an addition is allowed (-ffp-contract=off).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenloom.kernels.noise import log
from tokenloom.kernels.program import SPLIT

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LANES = 16
VOCABULARY_TILE = 1024

_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST = np.finfo(np.float32).max
_LARGEST_BF16 = np.float32(3.3895314e38)


def fma(a: Float32 | np.float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """fp32(a * b + c) with one rounding, elementwise.

    The product is exact in float64. The sum would be rounded twice, to float64 and then to fp32; rounding it
    to odd first makes the second rounding right (Boldo and Melquiond 2008): where the float64 sum is inexact
    and even, it moves one place towards the exact value, whose side the error of the sum tells (Knuth's
    TwoSum).
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    rounded_addend = total - product
    error = (product - (total - rounded_addend)) + (addend - rounded_addend)
    bits = total.view(np.int64)
    is_even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    moved = np.where((error != 0) & is_even & np.isfinite(total), np.where(away, bits + 1, bits - 1), bits)
    result: Float32 = moved.view(np.float64).astype(np.float32)
    return result


def flush(values: Float32) -> Float32:
    """Denormals as zero of the same sign."""
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def bf16(values: Float32) -> Float32:
    """Rounded to bfloat16, nearest even, held in fp32 (infinities stay; there is no NaN)."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded: Float32 = (bits + np.uint32(0x7FFF) + odd & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def linear_fp32(source: Float32, weight: Float32) -> Float32:
    """One row: fp32 [K], [N, K] -> [N]."""
    total = np.zeros(len(weight), np.float32)
    for k in range(len(source)):
        total = fma(source[k], weight[:, k], total)
    return total


def fma_flushed(a: Float32 | np.float32, b: Float32 | np.float32, c: Float32) -> Float32:
    """fma of flushed numbers with a flushed result.

    Rounding to a denormal takes everything from 2^-126 - 2^-150 up to 2^-126, rounding to 24 bits only what
    lies at 2^-126 - 2^-151 or above; what lies between is zero. The comparison with that edge is exact: where
    the result is that small, so is c, and the edge less c needs 51 bits.
    """
    result = fma(a, b, c)
    sign = np.copysign(1.0, result).astype(np.float64)
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    below = sign * product < (2.0**-126 - 2.0**-151) - sign * np.asarray(c, np.float64)
    at_edge = np.abs(result) == _SMALLEST_NORMAL
    return np.where(at_edge & below, np.copysign(np.float32(0), result), flush(result))


def linear_bf16(source: Float32, weight: Float32) -> Float32:
    """One row of bf16 values held in fp32: [K], [N, K] -> fp32 [N]. An odd K ends with a pair whose odd
    element is zero."""
    if len(source) % 2:
        source, weight = np.append(source, np.float32(0)), np.pad(weight, ((0, 0), (0, 1)))
    total = np.zeros(len(weight), np.float32)
    source, weight = flush(source), flush(weight)
    for k in range(0, len(source), 2):
        total = fma_flushed(source[k + 1], weight[:, k + 1], total)
        total = fma_flushed(source[k], weight[:, k], total)
    return total


def quantize_row(source: Float32) -> tuple[NDArray[np.int8], np.float32]:
    """fp32 [K] -> int8 [K] in [-127, 127], scale: q = x / scale rounded to even, scale = max |x| / 127 (1
    where that is below 2^-126), both fp32 divisions. A row that is not finite is garbage, but the same everywhere: NaN
    does not count in the maximum and becomes -127, and an infinite scale makes 0 of finite numbers and -127
    of infinite ones."""
    scale = np.fmax.reduce(np.abs(source), initial=np.float32(0)) / np.float32(127)
    scale = np.float32(1) if scale < _SMALLEST_NORMAL else np.float32(scale)
    with np.errstate(invalid="ignore"):
        scaled = np.rint(source / scale)
    scaled = np.where(scaled > -127, np.minimum(scaled, np.float32(127)), np.float32(-127))
    return scaled.astype(np.int8), scale


def linear_int8(
    source: NDArray[np.int8], source_scale: np.float32, weight: NDArray[np.int8], scales: Float32
) -> Float32:
    """One quantised row: [K], scalar, [N, K], fp32 [N] -> fp32 [N]: (float(sum of q * w) * scale of the
    column) * scale of the row; the sum is exact."""
    exact = weight.astype(np.int32) @ source.astype(np.int32)
    total: Float32 = exact.astype(np.float32) * scales * source_scale
    return total


def linear_int4(
    source: NDArray[np.int8],
    source_scale: np.float32,
    weight: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zeros: NDArray[np.uint8],
    group: int,
) -> Float32:
    """One quantised row: [K], scalar, [N, K] in 0..15, [N, groups] twice -> fp32 [N].

    Per group of `group` weights the sum of q * (w - zero) is exact; the fp32 total is a chain of
    fma(float(sum), float(scale), total) over the groups in order, and is multiplied by the scale of the row.
    """
    total = np.zeros(len(weight), np.float32)
    for index, start in enumerate(range(0, len(source), group)):
        part = slice(start, start + group)
        centred = weight[:, part].astype(np.int32) - zeros[:, index, None].astype(np.int32)
        exact = centred @ source[part].astype(np.int32)
        total = fma(exact.astype(np.float32), scales[:, index].astype(np.float32), total)
    return total * source_scale


def lane_sum(values: Float32) -> np.float32:
    """The sum of fp32 [n] in 16 lanes."""
    lanes = np.zeros(LANES, np.float32)
    for start in range(0, len(values), LANES):
        part = values[start : start + LANES]
        lanes[: len(part)] += part
    width = LANES // 2
    while width:
        lanes = lanes[:width] + lanes[width : 2 * width]
        width //= 2
    return np.float32(lanes[0])


_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_TERMS = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_EXP_MIN = np.float32(-87.33654)
_EXP_MAX = np.float32(88.72283)


def exp(x: Float32) -> Float32:
    """e^x in fp32 within 2 units in the last place, after Cephes (Moshier 1992): n = x log2(e) rounded to
    even, r = x - n * 0.693359375 + n * 2.1219444e-4 in two fused steps, a polynomial in r in fused steps, and
    2^n in two exact factors. Below -87.33654 (where the result leaves the normal numbers) it is 0, above
    88.72283 infinity; NaN stays."""
    x = np.asarray(x, np.float32)
    inside = np.clip(x, _EXP_MIN, _EXP_MAX)
    n = np.rint(inside * _LOG2_E)
    r = fma(n, -_LN2_HIGH, inside)
    r = fma(n, -_LN2_LOW, r)
    y = np.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        y = fma(y, r, term)
    y = fma(y, r * r, r) + np.float32(1)
    whole = np.nan_to_num(n).astype(np.int32)
    half = whole >> 1
    y = y * _power_of_two(half) * _power_of_two(whole - half)
    y = np.where(x < _EXP_MIN, np.float32(0), y)
    result: Float32 = np.where(x > _EXP_MAX, np.float32(np.inf), y)
    return result


def _power_of_two(n: NDArray[np.int32]) -> Float32:
    factor: Float32 = ((n + 127) << 23).astype(np.int32).view(np.float32)
    return factor


_TANH_TERMS = tuple(
    np.float32(c)
    for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)
_TANH_SMALL = np.float32(0.625)


def tanh(x: Float32) -> Float32:
    """Hyperbolic tangent in fp32, after Cephes: below 0.625 in size x + x * (z * polynomial(z)) of z = x * x in
    fused steps, from there 1 - 2 / (exp(2|x|) + 1) with the sign of x; NaN stays."""
    x = np.asarray(x, np.float32)
    size = np.abs(x)
    z = x * x
    y = np.full_like(x, _TANH_TERMS[0])
    for term in _TANH_TERMS[1:]:
        y = fma(y, z, term)
    near = fma(y * z, x, x)
    one, two = np.float32(1), np.float32(2)
    far = one - two / (exp(size + size) + one)
    result: Float32 = np.where(size < _TANH_SMALL, near, np.copysign(far, x))
    return result


def log_fp32(x: Float32 | np.float32) -> Float32:
    """Natural logarithm of positive numbers: the float64 one of `noise`, rounded to fp32."""
    result: Float32 = log(np.asarray(x).astype(np.float64)).astype(np.float32)
    return result


def rms_norm(x: Float32, weight: Float32, epsilon: float) -> Float32:
    """One row, fp32 [n]: x * (1 / sqrt(sum(x * x) / n + epsilon)) * weight; the squares are rounded before
    they are added in lanes."""
    mean = np.float32(lane_sum(x * x) / np.float32(len(x))) + np.float32(epsilon)
    scale = np.float32(1) / np.sqrt(mean)
    normed: Float32 = x * scale * weight
    return normed


def rope(head: Float32, cos: Float32, sin: Float32) -> Float32:
    """One head, fp32 [dim], rotated in halves by fp32 [rotary_dim / 2] cosines and sines."""
    half = len(cos)
    first, second = head[:half], head[half : 2 * half]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, head[2 * half :]])


def silu_mul(gate: Float32, up: Float32) -> Float32:
    """(gate / (1 + exp(-gate))) * up."""
    return gate / (np.float32(1) + exp(-gate)) * up


def gelu(x: Float32) -> Float32:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""
    inner = (x * x * x * np.float32(0.044715) + x) * np.float32(0.7978845608028654)
    return (tanh(inner) + np.float32(1)) * x * np.float32(0.5)


GELU_ERF_TERMS = tuple(
    np.float32(c)
    for c in (
        2.62956712e-2, -1.55637473e-1, 3.02078277e-1, -2.12750539e-1, 2.06698358e-1, 3.07582691e-2, 1.04321986e-1,
        9.84327719e-2, 9.9802658e-2,
    )
)  # fmt: skip
"""Of e^(x^2 / 2) * Phi(-x) / t in t = 1 / (1 + x / 4), Phi the normal distribution function, the highest power
first: a least-squares fit weighted until its largest relative error (6e-8) was the same everywhere, x up to 13."""


def gelu_erf(x: Float32) -> Float32:
    """x * Phi(x), the exact gelu, 0.5 * x * (1 + erf(x / sqrt(2))): Phi(-|x|) = exp(-x^2 / 2) * (polynomial(t) * t)
    with t = 1 / (1 + |x| / 4) and the polynomial in fused steps, and Phi(|x|) 1 less that."""
    x = np.asarray(x, np.float32)
    one = np.float32(1)
    t = one / fma(np.abs(x), np.float32(0.25), one)
    y = np.full_like(x, GELU_ERF_TERMS[0])
    for term in GELU_ERF_TERMS[1:]:
        y = fma(y, t, term)
    tail = exp(x * x * np.float32(-0.5)) * (y * t)
    result: Float32 = x * np.where(x < 0, tail, one - tail)
    return result


def layer_norm(x: Float32, weight: Float32, bias: Float32 | None, epsilon: float) -> Float32:
    """One row, fp32 [n]: `rms_norm` of x - sum(x) / n, and the bias added."""
    normed = rms_norm(x - lane_sum(x) / np.float32(len(x)), weight, epsilon)
    return normed if bias is None else normed + bias


def shrink(source: Float32, a: Float32, scale: float, *, narrow: bool) -> Float32:
    """One row of `v` of an adapter's block (program.Linear): fp32 [K], [rank, K] -> [rank].

    Lane l of 16 sums elements l, l + 16, ... of fp32 in fused steps, or (`narrow`, bf16 values) pairs l, l + 16, ...,
    the odd element of a pair first, with flushed steps. The lanes fold as in `lane_sum`; then the scale.
    """
    per_step = 2 * LANES if narrow else LANES
    pad = -len(source) % per_step
    x = np.pad(source, (0, pad)).reshape(-1, LANES, per_step // LANES)
    rows = np.pad(a, ((0, 0), (0, pad))).reshape(len(a), -1, LANES, per_step // LANES)
    lanes = np.zeros((len(a), LANES), np.float32)
    if narrow:
        x, rows = flush(x), flush(rows)
        for step in range(len(x)):
            lanes = fma_flushed(x[step, :, 1], rows[:, step, :, 1], lanes)
            lanes = fma_flushed(x[step, :, 0], rows[:, step, :, 0], lanes)
    else:
        for step in range(len(x)):
            lanes = fma(x[step, :, 0], rows[:, step, :, 0], lanes)
    totals = np.array([lane_sum(row) for row in lanes], np.float32)
    return totals * np.float32(scale)


def expand(v: Float32, b: Float32) -> Float32:
    """What a block adds to the columns of one row: fp32 [rank], [columns, rank] -> [columns], a chain of fused
    steps from rank 0 on."""
    total = np.zeros(len(b), np.float32)
    for j in range(len(v)):
        total = fma(b[:, j], v[j], total)
    return total


def route(scores: Float32, top_k: int, normalized: bool) -> tuple[Float32, NDArray[np.intp]]:
    """One row of `Route`: fp32 [experts] -> weights and numbers of the chosen, [top_k]. All exponentials are added
    in lanes, those of the chosen one by one."""
    chosen = np.argsort(-scores, kind="stable")[:top_k]
    e = exp(scores - scores[chosen[0]])
    total = lane_sum(e)
    if normalized:
        total = np.float32(0)
        for value in e[chosen]:
            total += value
    return e[chosen] / total, chosen


def attention(query: Float32, keys: Float32, values: Float32, scale: float, first: int = 0) -> Float32:
    """One query head over the keys of its path: [d], [n, d], [n, d] -> [d], all fp32 (as stored).

    Keys before `first` (outside a window) are not seen; splits keep their places. Lanes of scores and of the
    sum are keys; lanes of the result are head dimensions, each one chain over the keys of the split. A key
    that is not seen counts as a share of zero; adding zero at the end makes -0 into +0, whatever that key
    held.
    """
    scaled = query * np.float32(scale)

    def scores(start: int, end: int) -> Float32:
        return linear_fp32(scaled, keys[start:end])

    def products(shares: Float32, start: int, end: int) -> Float32:
        return linear_fp32(shares, values[start:end].T)

    return _attend(scores, products, len(keys), first)


def attention_bf16(query: Float32, keys: Float32, values: Float32, scale: float, first: int = 0) -> Float32:
    """As `attention`, for keys and values that are bf16 (held in fp32).

    The scaled query is rounded to bf16, and so are shares, denormals as zero, where they multiply values; the
    sum of shares is of those that were not rounded. Pairs are neighbouring dimensions and neighbouring keys.
    """
    scaled = bf16(query * np.float32(scale))

    def scores(start: int, end: int) -> Float32:
        return linear_bf16(scaled, keys[start:end])

    def products(shares: Float32, start: int, end: int) -> Float32:
        return linear_bf16(bf16(flush(shares)), values[start:end].T)

    return _attend(scores, products, len(keys), first)


def attention_int8(
    query: Float32,
    keys: tuple[Float32, Float32],
    values: tuple[Float32, Float32],
    scale: float,
    first: int = 0,
) -> Float32:
    """As `attention_bf16`, for (int8 values [n, d] held in fp32, fp32 scales [n]) of `stored_int8`.

    Scores are multiplied by the scale of their key, and shares by the scale of their value before they are
    rounded.
    """
    scaled = bf16(query * np.float32(scale))

    def scores(start: int, end: int) -> Float32:
        return linear_bf16(scaled, keys[0][start:end]) * keys[1][start:end]

    def products(shares: Float32, start: int, end: int) -> Float32:
        return linear_bf16(bf16(flush(shares * values[1][start:end])), values[0][start:end].T)

    return _attend(scores, products, len(keys[0]), first)


def _attend(
    scores_of: Callable[[int, int], Float32],
    products_of: Callable[[Float32, int, int], Float32],
    num_keys: int,
    first: int,
) -> Float32:
    best, total = np.float32(-np.inf), np.float32(0)
    weighted: Float32 | np.float32 = np.float32(0)
    for start in range(first // SPLIT * SPLIT, num_keys, SPLIT):
        end = min(start + SPLIT, num_keys)
        scores = scores_of(start, end)
        scores[: max(first - start, 0)] = -np.inf
        highest = scores.max()
        shares = exp(scores - highest)
        merged = max(best, highest)
        keep, take = exp(best - merged), exp(highest - merged)
        total = np.float32(total * keep + lane_sum(shares) * take)
        weighted = weighted * keep + products_of(shares, start, end) * take
        best = merged
    result: Float32 = np.asarray(weighted / total + np.float32(0))
    return result


def stored_fp32(values: Float32) -> Float32:
    """What an fp32 KV pool keeps: NaN as 0, infinities as the largest number."""
    return np.where(np.isnan(values), np.float32(0), np.clip(values, -_LARGEST, _LARGEST))


def stored_bf16(values: Float32) -> Float32:
    """What a bf16 KV pool keeps (held in fp32): nearest even; NaN as 0, and what is too large as the largest
    number."""
    return bf16(np.clip(stored_fp32(values), -_LARGEST_BF16, _LARGEST_BF16))


def stored_int8(values: Float32) -> tuple[Float32, np.float32]:
    """What an int8 KV pool keeps of one head of one token: (values in [-127, 127] held in fp32, scale).

    scale = max|x| / 127, 1 if that is zero; value = x / scale rounded to even and clipped.
    """
    finite = stored_fp32(values)
    scale = np.float32(np.abs(finite).max() / np.float32(127)) or np.float32(1)
    rounded = np.clip(np.rint(finite / scale), np.float32(-127), np.float32(127))
    return rounded + np.float32(0), scale  # integers have no -0


def log_sum_exp(logits: Float32) -> tuple[np.float32, np.float32]:
    """(max, log of the sum of exp(logit - max)) of fp32 [V], in tiles of `VOCABULARY_TILE` merged in
    order."""
    best, total = np.float32(-np.inf), np.float32(0)
    for start in range(0, len(logits), VOCABULARY_TILE):
        part = logits[start : start + VOCABULARY_TILE]
        highest = part.max()
        if highest == -np.inf:
            continue
        merged = max(best, highest)
        sums = lane_sum(exp(part - highest))
        total = np.float32(total * exp(best - merged) + sums * exp(highest - merged))
        best = merged
    return best, np.float32(log_fp32(total))


def logprob(logits: Float32, token: int) -> np.float32:
    """(logit - max) - log(sum of exp(logit - max)); 0 if all logits are -inf."""
    best, log_total = log_sum_exp(logits)
    if best == -np.inf:
        return np.float32(0)
    return np.float32(np.float32(logits[token] - best) - log_total)
