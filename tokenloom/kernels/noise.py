"""The noise of sampling: Philox4x32-10, and the Gumbel distribution, bit for bit the same on every machine.

Philox is counter-based ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al. 2011), so the noise of a
token is a function of its key and counter alone:

```
key      seed[0:32]       seed[32:64]
counter  token id // 4    position[0:32]    sample index    position[32:56] | purpose << 24
output   word token id % 4
```
Distinct (seed, sample index, purpose, position, token id) never share an output word: positions are below
2^56 and purposes below 2^8, so the four counter words and the word number give all five back. Four
neighbouring tokens share a block, which makes a row over the whole vocabulary four times cheaper.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]

MIN_GUMBEL = -3.13
MAX_GUMBEL = 22.88
"""32-bit noise lies strictly between these."""

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What a draw is for; part of the counter. The token id of `ACCEPT` and `DRAFT` is the number of the word."""

    TOKEN = 0
    ACCEPT = 1
    DRAFT = 2


def philox(counter: tuple[UInt64, UInt64, UInt64, UInt64], key: tuple[UInt64, UInt64]) -> tuple[UInt64, ...]:
    """Ten rounds on uint64 arrays that hold 32-bit words and broadcast together; returns the four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high = c0 * _MULTIPLIER_0
        low = c2 * _MULTIPLIER_1
        c0 = (low >> _SHIFT) ^ c1 ^ k0
        c2 = (high >> _SHIFT) ^ c3 ^ k1
        c1 = low & _LOW
        c3 = high & _LOW
        k0 = (k0 + np.uint64(_WEYL_0)) & _LOW
        k1 = (k1 + np.uint64(_WEYL_1)) & _LOW
    return c0, c1, c2, c3


def token_bits(
    seeds: UInt64,
    sample_index: UInt32,
    positions: NDArray[np.int64],
    token_ids: NDArray[Any],
    purpose: Purpose,
) -> UInt32:
    """Noise bits of single tokens; all arguments are arrays of one length (or broadcast to it)."""
    tokens = token_ids.astype(np.uint64)
    counter, key = _words(seeds, sample_index, positions, purpose, tokens >> np.uint64(2))
    words = np.stack(np.broadcast_arrays(*philox(counter, key)))
    found = np.take_along_axis(words, (tokens & np.uint64(3)).astype(np.intp)[None], axis=0)[0]
    bits: UInt32 = found.astype(np.uint32)
    return bits


def vocabulary_bits(
    seeds: UInt64, sample_index: UInt32, positions: NDArray[np.int64], vocab_size: int, purpose: Purpose
) -> UInt32:
    """Noise bits of every token, uint32 [n, vocab_size]; equal to `token_bits` of each."""
    blocks = np.arange((vocab_size + 3) // 4, dtype=np.uint64)[None]
    counter, key = _words(seeds[:, None], sample_index[:, None], positions[:, None], purpose, blocks)
    words = np.empty((len(seeds), blocks.shape[1], 4), np.uint32)
    for i, word in enumerate(philox(counter, key)):
        words[:, :, i] = word
    return words.reshape(len(seeds), -1)[:, :vocab_size]


def gumbel(bits: UInt32) -> Float64:
    """-log(-log(u)) in float64 with u = (bits + 1/2) / 2^32, which is exact; `log` is the one below."""
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return -log(-log(uniform))


_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_L1, _L2, _L3, _L4, _L5, _L6, _L7 = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_SQRT_HALF_BITS = np.int64(0x3FE6A09E00000000)
_ONE_BITS = np.int64(0x3FF0000000000000)
_MANTISSA_BITS = np.int64(0x000FFFFFFFFFFFFF)


def log(x: Float64) -> Float64:
    """Natural logarithm of positive normal float64 numbers, within one unit in the last place.

    The algorithm of fdlibm (Sun Microsystems 1993): x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), then
    a polynomial in s = f / (2 + f). Only IEEE + - * / and bit operations in the written order, each rounded
    (no fused multiply-add), so that any language gives these bits.
    """
    bits = np.asarray(x, np.float64).view(np.int64) + (_ONE_BITS - _SQRT_HALF_BITS)
    k = ((bits >> np.int64(52)) - np.int64(0x3FF)).astype(np.float64)
    f = ((bits & _MANTISSA_BITS) + _SQRT_HALF_BITS).view(np.float64) - 1.0
    half_square = 0.5 * f * f
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (_L2 + w * (_L4 + w * _L6))
    odd = z * (_L1 + w * (_L3 + w * (_L5 + w * _L7)))
    series = odd + even
    return s * (half_square + series) + k * _LN2_LOW - half_square + f + k * _LN2_HIGH


def _words(
    seeds: UInt64, sample_index: UInt32, positions: NDArray[np.int64], purpose: Purpose, blocks: UInt64
) -> tuple[tuple[UInt64, UInt64, UInt64, UInt64], tuple[UInt64, UInt64]]:
    place = positions.astype(np.uint64)
    last = (place >> _SHIFT) | np.uint64(purpose << 24)
    return (blocks, place & _LOW, sample_index.astype(np.uint64), last), (seeds & _LOW, seeds >> _SHIFT)
