"""From a sequence's parameters to the edits of its next logit row, and when a sequence ends."""

from __future__ import annotations

import numpy as np

from tokenloom.engine.batch import LogitEdits
from tokenloom.engine.sequence import Sequence


def logit_edits(seq: Sequence) -> LogitEdits | None:
    """The edits for the next token of `seq`, or None when there are none at this position."""
    params = seq.request.params
    edits = LogitEdits()
    empty = True
    if params.allowed_token_ids is not None:
        edits.allowed_ids = np.array(sorted(set(params.allowed_token_ids)), np.int32)
        empty = False
    if params.has_penalties:
        counts = dict.fromkeys(seq.tokens[: seq.num_prompt], 0)
        counts.update(seq.output_counts)
        edits.seen_ids = np.fromiter(counts.keys(), np.int32, len(counts))
        edits.output_counts = np.fromiter(counts.values(), np.int32, len(counts))
        edits.repetition_penalty = params.repetition_penalty
        edits.frequency_penalty = params.frequency_penalty
        edits.presence_penalty = params.presence_penalty
        empty = False
    bias: dict[int, float] = dict(params.logit_bias)
    for token in banned_tokens(seq):
        bias[token] = -np.inf
    if bias:
        edits.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        edits.bias = np.fromiter(bias.values(), np.float32, len(bias))
        empty = False
    return None if empty else edits


def banned_tokens(seq: Sequence) -> set[int]:
    """Tokens that may not come next: ends before `min_tokens`, and the last token of each begun bad word."""
    banned: set[int] = set()
    if len(seq.tokens) < seq.min_length:
        banned |= seq.stop_ids
    for word in seq.bad_word_ids:
        head = len(word) - 1
        if head == 0 or (seq.num_output >= head and tuple(seq.tokens[-head:]) == word[:-1]):
            banned.add(word[-1])
    return banned


def finish_if_done(seq: Sequence, token: int) -> bool:
    """Decide whether the committed `token` ended `seq`; sets `finish_reason` and `stop`.

    End tokens win over stop strings, stop strings over the length. End tokens cannot be sampled before
    `min_tokens`, and the checker knows that bound itself. An end-of-sequence token is no `stop`.
    """
    if token in seq.stop_ids:
        seq.finish_reason = "stop"
        if token in seq.request.params.stop_token_ids:
            seq.stop = token
        return True
    if seq.checker is not None:
        stop_text = seq.checker.push(token)
        if stop_text is not None:
            seq.finish_reason = "stop"
            seq.stop = stop_text
            return True
    if len(seq.tokens) >= seq.max_length:
        seq.finish_reason = "length"
        return True
    return False
