"""From final rows to tokens: logits, edits, log-probabilities and draws, in tiles of at most 64 rows.

No array of [rows, vocabulary] is larger than a tile. A row that several entries share has its logits computed
once. A draw is the argmax of (score + Gumbel noise) over the tokens that may be drawn, in float64, ties to
the lowest id (the Gumbel-max trick, Gumbel 1954; Maddison et al. 2014), with score = fp32((logit - max) / T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import LogitEdits, LogitRows, StepResult, TopLogprobs
from tokenloom.kernels.noise import MAX_GUMBEL, MIN_GUMBEL, Purpose, gumbel, token_bits, vocabulary_bits
from tokenloom.kernels.reference.gemm import ROW_TILE, PackedLinear, padded
from tokenloom.kernels.reference.truncation import key_ids, order_keys, smallest, truncate

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Indices = NDArray[np.intp]

TILE_ROWS = 64

_NOISE_RANGE = np.float32(MAX_GUMBEL - MIN_GUMBEL + 1)
"""A token this far below the best is never drawn."""

_SLACK = np.float32(1 - 1e-4)
_LARGEST = np.finfo(np.float32).max
_TINY = np.float32(2.0**-32)


HeadUpdate = Callable[[NDArray[np.integer[Any]], Float32, Float32], None]


class Sampler:
    """The head of a program: its weight, its softcap, and the draws."""

    def __init__(
        self,
        weight: PackedLinear,
        softcap: float | None = None,
        divisor: float = 1.0,
        update: HeadUpdate | None = None,
    ) -> None:
        """`update(rows, hidden, logits)` changes the logits of some rows in place (adapters)."""
        self._weight = weight
        self._update = update
        self._softcap = softcap
        self._divisor = np.float32(divisor)
        self._vocab_size = weight.num_columns

    def sample(self, hidden: Float32, entries: LogitRows) -> StepResult:
        """One token per entry; `hidden` fp32 [T, width] are the final rows of the batch."""
        count = len(entries)
        result = StepResult(np.zeros(count, np.int32), np.full(count, np.nan, np.float32), {})
        if not count:
            return result
        tops: dict[int, TopLogprobs] = {}
        rows, owners = np.unique(entries.rows, return_inverse=True)
        order = np.argsort(owners, kind="stable")
        for begin in range(0, len(rows), TILE_ROWS):
            logits = self.logits(hidden, rows[begin : begin + TILE_ROWS])
            first, last = np.searchsorted(owners[order], (begin, begin + TILE_ROWS))
            for start in range(first, last, TILE_ROWS):
                chosen = order[start : min(start + TILE_ROWS, last)]
                _sample_tile(logits, owners[chosen] - begin, chosen, entries, result, tops)
        result.top = tops
        return result

    def logits(self, hidden: Float32, rows: NDArray[np.integer[Any]]) -> Float32:
        """fp32 [n, vocabulary] of at most `TILE_ROWS` rows of `hidden`. NaN becomes -inf and +inf the largest
        number, so that a broken model gives a token and not a crash."""
        count = len(rows)
        source = np.zeros((padded(count, ROW_TILE), self._weight.depth), np.float32)
        source[:count] = hidden[rows]
        wide = np.empty((len(source), self._weight.padded_columns), np.float32)
        self._weight.multiply(source, wide)
        logits = wide[:count, : self._vocab_size]
        if self._update is not None:
            self._update(rows, source[:count], logits)
        if self._divisor != 1:
            logits /= self._divisor
        if self._softcap is not None:
            cap = np.float32(self._softcap)
            logits = np.tanh(logits / cap) * cap
        _sanitize(logits)
        return logits


def _sample_tile(
    logits: Float32,
    rows: Indices,
    entries_of: Indices,
    entries: LogitRows,
    result: StepResult,
    tops: dict[int, TopLogprobs],
) -> None:
    """Entries `entries_of` [e], whose logits are logits[rows]."""
    targets = entries.targets[entries_of]
    tokens = targets.copy()
    drawn = targets < 0
    plain = drawn & (entries.temperatures[entries_of] <= 0)
    if entries.edits:
        plain &= np.array([int(e) not in entries.edits for e in entries_of], bool)
    if plain.any():
        tokens[plain] = np.argmax(logits, axis=1)[rows[plain]]
    processed = np.flatnonzero(drawn & ~plain)
    if len(processed):
        edited = logits[rows[processed]]
        apply_edits(edited, entries_of[processed], entries.edits)
        _sanitize(edited)
        tokens[processed] = _choose(edited, entries_of[processed], entries)
    result.token_ids[entries_of] = tokens
    scored = np.flatnonzero((entries.num_logprobs[entries_of] >= 0) | ~drawn)
    if len(scored):
        values = log_softmax(logits[rows[scored]])
        result.logprobs[entries_of[scored]] = values[np.arange(len(scored)), tokens[scored]]
        _top_logprobs(values, tokens[scored], entries_of[scored], entries.num_logprobs, tops)


def _sanitize(logits: Float32) -> None:
    """NaN becomes -inf and +inf the largest number, in place: what is broken costs its own row, never the step."""
    np.fmax(logits, np.float32(-np.inf), out=logits)
    np.fmin(logits, _LARGEST, out=logits)


def apply_edits(logits: Float32, entries_of: Indices, edits: Mapping[int, LogitEdits]) -> None:
    """`LogitEdits` on rows of logits, in place, in fp32 and in the order of its fields."""
    for i, entry in enumerate(entries_of.tolist()):
        edit = edits.get(entry)
        if edit is None:
            continue
        row = logits[i]
        if edit.allowed_ids is not None:
            kept = row[edit.allowed_ids]
            row.fill(-np.inf)
            row[edit.allowed_ids] = kept
        if edit.seen_ids is not None:
            values = row[edit.seen_ids]
            if edit.repetition_penalty != 1.0:
                penalty = np.float32(edit.repetition_penalty)
                values = np.where(values > 0, values / penalty, values * penalty)
            if edit.output_counts is not None:
                counts = edit.output_counts.astype(np.float32)
                values -= np.float32(edit.frequency_penalty) * counts
                values -= np.float32(edit.presence_penalty) * (counts > 0).astype(np.float32)
            row[edit.seen_ids] = values
        if edit.bias_ids is not None and edit.bias is not None:
            row[edit.bias_ids] += edit.bias


def log_softmax(logits: Float32) -> Float32:
    """fp32 [n, V]: (logit - max) - log(sum of exp(logit - max)); the order of the sum depends on V only."""
    values: Float32 = logits - np.maximum.reduce(logits, axis=1)[:, None]
    sums = np.add.reduce(np.exp(values), axis=1)
    values -= np.log(sums)[:, None]
    # The row of a broken model, all -inf, has no distribution.
    np.fmin(values, np.float32(0), out=values)
    return values


def _choose(logits: Float32, entries_of: Indices, entries: LogitRows) -> Int32:
    """Tokens of edited rows: the best one at temperature 0, else a draw."""
    best = np.maximum.reduce(logits, axis=1)
    tokens: Int32 = np.argmax(logits, axis=1).astype(np.int32)
    temperatures = entries.temperatures[entries_of]
    for i in np.flatnonzero(best == -np.inf).tolist():
        tokens[i] = _lowest_allowed(entries.edits.get(int(entries_of[i])))
    random = np.flatnonzero((temperatures > 0) & (best > -np.inf))
    if not len(random):
        return tokens
    chosen = entries_of[random]
    scores = logits if len(random) == len(logits) else logits[random]
    scores -= best[random][:, None]
    scores /= temperatures[random][:, None]
    # -0, from a quotient that underflows, would be ordered behind 0.
    scores += np.float32(0)
    truncate(scores, entries.top_k[chosen], entries.top_p[chosen], entries.min_p[chosen])
    tokens[random] = _draw(scores, chosen, entries)
    return tokens


def _lowest_allowed(edit: LogitEdits | None) -> int:
    """The token of a row that excludes everything: the lowest of its `allowed_ids`, 0 if it has none."""
    if edit is None or edit.allowed_ids is None or not len(edit.allowed_ids):
        return 0
    return int(edit.allowed_ids.min())


def _draw(scores: Float32, entries_of: Indices, entries: LogitRows) -> Int32:
    """argmax of score + Gumbel noise per row of fp32 [n, V], whose best score is 0.

    -log(u) is at least 1 - u, so score + noise is at most log(exp(score) / (1 - u)). That bound costs no
    logarithm; the exact float64 noise is computed for the token with the highest bound, and then for those
    whose bound reaches its value (one or two as a rule). The slack covers the fp32 rounding of the bounds.
    """
    count, vocab_size = scores.shape
    rows, tokens = np.nonzero(scores >= -_NOISE_RANGE)
    seeds, samples, positions = (
        entries.seeds[entries_of], entries.sample_index[entries_of], entries.positions[entries_of]
    )  # fmt: skip
    if 4 * len(rows) > count * vocab_size:
        bits = vocabulary_bits(seeds, samples, positions, vocab_size, Purpose.TOKEN)[rows, tokens]
    else:
        bits = token_bits(seeds[rows], samples[rows], positions[rows], tokens, Purpose.TOKEN)
    found = scores[rows, tokens]
    bounds = np.exp(found)
    bounds /= ((~bits).astype(np.float32) + np.float32(0.5)) * _TINY
    starts = np.searchsorted(rows, np.arange(count))
    highest = np.maximum.reduceat(bounds, starts)
    leaders = np.flatnonzero(bounds == highest[rows])
    values = found[leaders].astype(np.float64) + gumbel(bits[leaders])
    reached = np.zeros(count)
    np.maximum.at(reached, rows[leaders], np.exp(values))
    rivals = np.flatnonzero(bounds >= reached[rows] * _SLACK)
    values = found[rivals].astype(np.float64) + gumbel(bits[rivals])
    owners = rows[rivals]
    # By row, then falling value, then id (which is the order already): the first of each row wins.
    order = np.lexsort((-values, owners))
    first = np.searchsorted(owners[order], np.arange(count))
    return tokens[rivals[order[first]]].astype(np.int32)


def _top_logprobs(
    values: Float32, tokens: Int32, entries_of: Indices, num_logprobs: Int32, tops: dict[int, TopLogprobs]
) -> None:
    """The best tokens by (-logprob, id) of each row that wants them, and the rank of its own token."""
    wanted = num_logprobs[entries_of]
    asked = np.flatnonzero(wanted >= 0)
    if not len(asked):
        return
    keys = order_keys(values[asked])
    own = keys[np.arange(len(asked)), tokens[asked]]
    ranks = np.count_nonzero(keys < own[:, None], axis=1) + 1
    most = min(int(wanted[asked].max()), values.shape[1])
    ids = key_ids(smallest(keys, most)) if most else np.zeros((len(asked), 0), np.int32)
    logprobs = np.take_along_axis(values[asked], ids, axis=1)
    for i, (entry, k) in enumerate(zip(entries_of[asked].tolist(), wanted[asked].tolist(), strict=True)):
        tops[entry] = TopLogprobs(ids[i, :k], logprobs[i, :k], int(ranks[i]))
