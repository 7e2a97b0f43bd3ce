"""From a sequence's parameters to the edits of its next logit row, and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from tokenloom.engine.batch import LogitEdits
from tokenloom.engine.sequence import Sequence


def logit_edits(seq: Sequence, path: Seq[int] = ()) -> LogitEdits | None:
    """The edits for the token of `seq` after its committed ones and `path`, or None when there are none there."""
    params = seq.request.params
    edits = LogitEdits()
    empty = True
    if params.allowed_token_ids is not None:
        edits.allowed_ids = np.array(sorted(set(params.allowed_token_ids)), np.int32)
        empty = False
    if params.has_penalties:
        counts = dict.fromkeys(seq.tokens[: seq.num_prompt], 0)
        counts.update(seq.output_counts)
        for token in path:
            counts[token] = counts.get(token, 0) + 1
        edits.seen_ids = np.fromiter(counts.keys(), np.int32, len(counts))
        edits.output_counts = np.fromiter(counts.values(), np.int32, len(counts))
        edits.repetition_penalty = params.repetition_penalty
        edits.frequency_penalty = params.frequency_penalty
        edits.presence_penalty = params.presence_penalty
        empty = False
    bias: dict[int, float] = dict(params.logit_bias)
    for token in banned_tokens(seq, path):
        bias[token] = -np.inf
    if bias:
        edits.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        edits.bias = np.fromiter(bias.values(), np.float32, len(bias))
        empty = False
    return None if empty else edits


def banned_tokens(seq: Sequence, path: Seq[int] = ()) -> set[int]:
    """Tokens that may not come after `path`: ends before `min_tokens`, and the last token of each begun bad word."""
    banned: set[int] = set()
    if len(seq.tokens) + len(path) < seq.min_length:
        banned |= seq.stop_ids
    for word in seq.bad_word_ids:
        head = len(word) - 1
        if head == 0 or (seq.num_output + len(path) >= head and _last(seq.tokens, path, head) == word[:-1]):
            banned.add(word[-1])
    return banned


def _last(tokens: Seq[int], path: Seq[int], count: int) -> tuple[int, ...]:
    """The last `count` > 0 of tokens and path together."""
    before = max(count - len(path), 0)
    return (*tokens[len(tokens) - before :], *path[max(len(path) - count, 0) :])


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
