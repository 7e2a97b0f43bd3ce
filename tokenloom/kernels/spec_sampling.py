"""The exact oracle of the sampler: one logit row at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import LogitEdits, TopLogprobs
from tokenloom.kernels.noise import Purpose, gumbel, log, token_bits
from tokenloom.kernels.spec import exp, log_sum_exp, tanh

Float32 = NDArray[np.float32]

MASS_ONE = 2**34
"""The mass of the best token. With at most `MAX_VOCABULARY` tokens, every sum of masses is exact in float64."""
MAX_VOCABULARY = 2**19 - 16


def sanitized(logits: Float32) -> Float32:
    """NaN becomes -inf and +inf the largest number."""
    return np.fmin(np.fmax(logits, np.float32(-np.inf)), np.finfo(np.float32).max)


def finished(logits: Float32, softcap: float | None = None) -> Float32:
    """Fresh fp32 logits as the sampler reads them: capped to softcap * tanh(logit / softcap), then sanitized."""
    if softcap is not None:
        cap = np.float32(softcap)
        logits = tanh(logits / cap) * cap
    return sanitized(logits)


def edited(logits: Float32, edits: LogitEdits | None) -> Float32:
    """`LogitEdits` applied to sanitized fp32 [V], each step rounded to fp32; the outcome is sanitized again."""
    row = logits.copy()
    if edits is None:
        return row
    if edits.allowed_ids is not None:
        allowed = set(edits.allowed_ids.tolist())
        for token in range(len(row)):
            if token not in allowed:
                row[token] = -np.inf
    if edits.seen_ids is not None:
        repetition = np.float32(edits.repetition_penalty)
        for i, token in enumerate(edits.seen_ids.tolist()):
            value = row[token] / repetition if row[token] > 0 else row[token] * repetition
            if edits.output_counts is not None:
                count = edits.output_counts[i]
                value = value - np.float32(edits.frequency_penalty) * np.float32(count)
                value = value - np.float32(edits.presence_penalty) * np.float32(count > 0)
            row[token] = value
    if edits.bias_ids is not None and edits.bias is not None:
        for token, bias in zip(edits.bias_ids.tolist(), edits.bias, strict=True):
            row[token] += bias
    return sanitized(row)


def mass(share: float) -> int:
    """exp(score) in units of 1 / `MASS_ONE`, to the nearest, ties to even."""
    return int(np.rint(share * MASS_ONE))


def kept_tokens(scores: Float32, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Tokens that may be drawn, best first, of scores (logit - max) / temperature; see `truncate` of the
    reference for the rules. What top_p adds are masses, which are whole numbers: their sums are exact in any
    order, so the boundary can be found without a sort of the vocabulary. The rounding moves a probability by
    less than V * 2^-35."""
    order = [t for t in np.lexsort((np.arange(len(scores)), -scores)).tolist() if scores[t] > -np.inf]
    if min_p > 0:
        bound = float(log(np.array(np.float32(min_p), np.float64)))
        order = [t for t in order if float(scores[t]) >= bound]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        masses = [mass(share) for share in exp(scores[order]).tolist()]
        wanted = float(np.float32(top_p)) * float(sum(masses))
        kept, before = 0, 0
        for part in masses:
            if kept and before >= wanted:
                break
            before += part
            kept += 1
        order = order[:kept]
    return order


def choose(
    logits: Float32,
    edits: LogitEdits | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sample_index: int,
    position: int,
) -> int:
    """The token of one entry: argmax of score + noise over the tokens that may be drawn, ties to the lowest
    id; at temperature 0 the argmax of the edited logits. If everything is excluded, the lowest allowed id."""
    row = edited(logits, edits)
    best = row.max()
    if best == -np.inf:
        allowed = [0] if edits is None or edits.allowed_ids is None else sorted(edits.allowed_ids.tolist())
        return int(allowed[0]) if allowed else 0
    if not temperature > 0:
        return int(np.argmax(row))
    scores = (row - best) / np.float32(temperature)
    tokens = np.sort(kept_tokens(scores, top_k, top_p, min_p))
    bits = token_bits(
        np.array([seed], np.uint64),
        np.array([sample_index], np.uint32),
        np.array([position], np.int64),
        tokens,
        Purpose.TOKEN,
    )
    return int(tokens[np.argmax(scores[tokens].astype(np.float64) + gumbel(bits))])


def candidates(
    logits: Float32,
    edits: LogitEdits | None,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sample_index: int,
    position: int,
    count: int,
) -> list[tuple[int, float]]:
    """The `count` best tokens by (-score, id) of what `choose` takes the first of: at temperature 0 the score is the
    edited logit, else score + noise. Excluded tokens are none of them."""
    row = edited(logits, edits)
    best = row.max()
    if best == -np.inf:
        return []
    if temperature > 0:
        scores = (row - best) / np.float32(temperature)
        tokens = np.sort(kept_tokens(scores, top_k, top_p, min_p))
        bits = token_bits(
            np.array([seed], np.uint64),
            np.array([sample_index], np.uint32),
            np.array([position], np.int64),
            tokens,
            Purpose.TOKEN,
        )
        values = scores[tokens].astype(np.float64) + gumbel(bits)
    else:
        tokens = np.flatnonzero(row > -np.inf)
        values = row[tokens].astype(np.float64)
    order = np.lexsort((tokens, -values))[:count]
    return list(zip(tokens[order].tolist(), values[order].tolist(), strict=True))


@dataclass(slots=True)
class Scored:
    """What one entry returns: `logprob` is NaN and `top` None where they were not asked for."""

    token: int
    logprob: np.float32
    top: TopLogprobs | None


def scored(logits: Float32, token: int, num_logprobs: int, is_target: bool) -> Scored:
    """The log-probability of the token under the raw logits, and the best tokens by (-logprob, id).

    A row that is -inf everywhere has no distribution: its log-probabilities count as 0.
    """
    if num_logprobs < 0 and not is_target:
        return Scored(token, np.float32(np.nan), None)
    best, log_total = log_sum_exp(logits)
    values = np.zeros_like(logits) if best == -np.inf else (logits - best) - log_total
    if num_logprobs < 0:
        return Scored(token, values[token], None)
    order = np.lexsort((np.arange(len(values)), -values))
    ids = order[:num_logprobs].astype(np.int32)
    rank = int(np.flatnonzero(order == token)[0]) + 1
    return Scored(token, values[token], TopLogprobs(ids, values[ids], rank))
