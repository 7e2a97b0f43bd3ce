"""Which tokens may be drawn: min_p, top_k and top_p over rows of scaled logits.

Everything works on keys that order tokens by (-score, id), so that ties at a boundary go to the lowest id and
the outcome does not depend on how a sort breaks them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenloom.kernels.noise import log

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SHIFT = np.uint64(32)
_ID = np.uint64(0xFFFFFFFF)
_NO_MORE = np.uint64(0xFFFFFFFFFFFFFFFF)
_FIRST_PREFIX = 256
_NEGATIVE_INFINITY = np.float32(-np.inf)


def order_keys(scores: Float32) -> UInt64:
    """uint64 [n, V] whose ascending order is (-score, id), for scores that are at most 0."""
    keys = (scores.view(np.uint32) & _MAGNITUDE).astype(np.uint64)
    keys <<= _SHIFT
    keys |= np.arange(scores.shape[1], dtype=np.uint64)
    return keys


def key_ids(keys: UInt64) -> Int32:
    """The token ids of keys."""
    return (keys & _ID).astype(np.int32)


def smallest(keys: UInt64, count: int) -> UInt64:
    """The `count` smallest keys of each row, in order."""
    if count < keys.shape[1]:
        keys = np.partition(keys, count - 1, axis=1)[:, :count]
    return np.sort(keys, axis=1)


def truncate(scores: Float32, top_k: Int32, top_p: Float32, min_p: Float32) -> None:
    """Set the scores of excluded tokens to -inf, in place.

    `scores` fp32 [n, V] are (logit - max) / temperature, so the best is 0. In this order, as vLLM has it:
    min_p keeps tokens with a probability of at least min_p times the best one's; top_k (0: off) keeps the k
    best; top_p keeps the shortest run of best tokens whose probability, among those left, reaches top_p: a
    token stays if the sum of exp(score) over all before it, added in order in float64, is below top_p times
    the total. At least one token stays.
    """
    if (min_p > 0).any():
        # min_p 0 excludes nothing; its logarithm is never looked at.
        bounds = log(np.where(min_p > 0, min_p, 1).astype(np.float64))
        bounds[min_p <= 0] = -np.inf
        scores[scores < bounds[:, None]] = _NEGATIVE_INFINITY
    limited = np.flatnonzero((top_k > 0) & (top_k < scores.shape[1]))
    if len(limited):
        keys = order_keys(scores[limited])
        wanted = top_k[limited].astype(np.intp)
        prefix = smallest(keys, int(wanted.max()))
        _exclude(scores, limited, keys, prefix[np.arange(len(limited)), wanted - 1])
    nucleus = np.flatnonzero(top_p < 1)
    if len(nucleus):
        keys = order_keys(scores[nucleus])
        _exclude(scores, nucleus, keys, _nucleus_ends(scores[nucleus], keys, top_p[nucleus]))


def _nucleus_ends(scores: Float32, keys: UInt64, top_p: Float32) -> UInt64:
    """The last key that stays, per row."""
    totals = np.add.reduce(np.exp(scores).astype(np.float64), axis=1)
    wanted = (top_p.astype(np.float64) * totals)[:, None]
    count = min(_FIRST_PREFIX, keys.shape[1])
    while True:
        prefix = smallest(keys, count)
        values = np.exp(np.take_along_axis(scores, key_ids(prefix), axis=1)).astype(np.float64)
        sums = np.cumsum(values, axis=1)
        if count == keys.shape[1] or (sums[:, -1:] >= wanted).all():
            break
        count = min(count * 8, keys.shape[1])
    before = sums - values
    before[:, 1:] = sums[:, :-1]
    num_kept = np.maximum((before < wanted).sum(axis=1), 1)
    ends: UInt64 = prefix[np.arange(len(prefix)), num_kept - 1]
    return ends


def _exclude(scores: Float32, rows: NDArray[np.intp], keys: UInt64, ends: UInt64) -> None:
    part = scores[rows]
    part[keys > ends[:, None]] = _NEGATIVE_INFINITY
    scores[rows] = part
