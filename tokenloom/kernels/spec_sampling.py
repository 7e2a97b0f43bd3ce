"""The exact oracle of the sampler: one logit row at a time, in plain loops."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import LogitEdits
from tokenloom.kernels.noise import Purpose, gumbel, log, token_bits
from tokenloom.kernels.spec import exp

Float32 = NDArray[np.float32]


def edited(logits: Float32, edits: LogitEdits | None) -> Float32:
    """`LogitEdits` applied to fp32 [V], each step rounded to fp32."""
    row = logits.copy()
    if edits is None:
        return row
    if edits.allowed_ids is not None:
        allowed = set(edits.allowed_ids.tolist())
        for token in range(len(row)):
            if token not in allowed:
                row[token] = -np.inf
    if edits.seen_ids is not None and edits.output_counts is not None:
        for token, count in zip(edits.seen_ids.tolist(), edits.output_counts.tolist(), strict=True):
            value = row[token]
            repetition = np.float32(edits.repetition_penalty)
            value = value / repetition if value > 0 else value * repetition
            value = value - np.float32(edits.frequency_penalty) * np.float32(count)
            row[token] = value - np.float32(edits.presence_penalty) * np.float32(count > 0)
    if edits.bias_ids is not None and edits.bias is not None:
        for token, bias in zip(edits.bias_ids.tolist(), edits.bias, strict=True):
            row[token] += bias
    return row


def kept_tokens(scores: Float32, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Tokens that may be drawn, best first, of scores (logit - max) / temperature; see `truncate` of the
    reference for the rules."""
    order = sorted((t for t in range(len(scores)) if scores[t] > -np.inf), key=lambda t: (-scores[t], t))
    if min_p > 0:
        bound = float(log(np.array(np.float32(min_p), np.float64)))
        order = [t for t in order if float(scores[t]) >= bound]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        shares = [float(exp(scores[t])) for t in order]
        wanted = float(np.float32(top_p)) * math.fsum(shares)
        kept, before = 0, 0.0
        for share in shares:
            if kept and before >= wanted:
                break
            before += share
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
    if temperature <= 0:
        return int(np.argmax(row))
    scores = (row - best) / np.float32(temperature)
    chosen, highest = -1, -math.inf
    for token in sorted(kept_tokens(scores, top_k, top_p, min_p)):
        bits = token_bits(
            np.array([seed], np.uint64),
            np.array([sample_index], np.uint32),
            np.array([position], np.int64),
            np.array([token]),
            Purpose.TOKEN,
        )
        value = float(scores[token]) + float(gumbel(bits)[0])
        if value > highest:
            chosen, highest = token, value
    return chosen
