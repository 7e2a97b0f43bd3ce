"""The tree of a draft by its definition: every path computed from scratch, candidates taken one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.kernels.harness import Entry, Run, make_batch
from tokenloom.engine.batch import PAGE_SIZE, LogitEdits
from tokenloom.engine.proposer import Proposal
from tokenloom.kernels.noise import Purpose, gumbel, token_bits
from tokenloom.kernels.spec_sampling import edited, kept_tokens, sanitized
from tokenloom.runtime.local import LocalExecutor

Float32 = NDArray[np.float32]
Logits = Callable[[Sequence[int]], Float32]


@dataclass(frozen=True)
class Sampling:
    """The sampling state of a request."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    edits: LogitEdits | None = None


def fresh_logits(executor: LocalExecutor) -> Logits:
    """Logits after a text, computed as one sequence from its first token on, on pages that nobody has used since."""
    known: dict[tuple[int, ...], Float32] = {}

    def logits(tokens: Sequence[int]) -> Float32:
        key = tuple(tokens)
        if key not in known:
            pages = range(-(-len(key) // PAGE_SIZE))
            batch = make_batch([Run(key, 0, len(key), pages)], [Entry(len(key) - 1)])
            executor.collect(executor.submit(batch))
            known[key] = executor.backend.logits(np.array([len(key) - 1], np.int32))[0].copy()
        return known[key]

    return logits


def candidates(logits: Float32, sampling: Sampling, position: int) -> list[tuple[int, float]]:
    """(token, confidence) of the eight best, best first."""
    row = edited(sanitized(logits), sampling.edits)
    best = row.max()
    if best == -np.inf:
        return []
    if sampling.temperature == 0:
        scores = {token: float(value) for token, value in enumerate(row) if value > -np.inf}
    else:
        scaled = (row - best) / np.float32(sampling.temperature)
        scores = {}
        for token in kept_tokens(scaled, sampling.top_k, sampling.top_p, sampling.min_p):
            bits = token_bits(
                np.array([sampling.seed], np.uint64),
                np.array([sampling.sample_index], np.uint32),
                np.array([position], np.int64),
                np.array([token]),
                Purpose.TOKEN,
            )
            scores[token] = float(scaled[token]) + float(gumbel(bits)[0])
    ranked = sorted(scores, key=lambda token: (-scores[token], token))[:8]
    total = sum(math.exp(scores[token] - scores[ranked[0]]) for token in ranked)
    return [(token, math.exp(scores[token] - scores[ranked[0]]) / total) for token in ranked]


def tree(logits: Logits, tokens: Sequence[int], sampling: Sampling, depth: int, width: int) -> Proposal:
    """The tree below the last of `tokens`."""
    proposal = Proposal()
    beams: list[tuple[int, float, list[int]]] = [(-1, 1.0, [])]
    for level in range(depth):
        options = []
        for beam, (_, reach, path) in enumerate(beams):
            found = candidates(logits([*tokens, *path]), sampling, len(tokens) + level)
            for rank, (token, confidence) in enumerate(found):
                options.append((-reach * confidence, beam, rank, token, confidence))
        options.sort(key=lambda option: option[:3])
        grown = []
        for negative, beam, rank, token, confidence in options[:width]:
            parent, _, path = beams[beam]
            grown.append((len(proposal.tokens), -negative, [*path, token]))
            proposal.tokens.append(token)
            proposal.parents.append(parent)
            proposal.ranks.append(rank)
            proposal.confidences.append(confidence)
        beams = grown
    return proposal
