"""The engine's judge of requests of the exactness class `distribution`: their trees are verified by rejection.

The tokens of a verdict take the place of those that the rows have sampled, so that the ordinary commit walks down the
judged path. All tokens of such a request are decided here, with `Purpose.ACCEPT`, also where there is no tree. Why any
proposal is lawful:

- Trees follow from tokens before them, the noise that coupled drafts look at (`Purpose.TOKEN`), and numbers of
  proposers of their own, none of which are used here. Given all of that, the numbers of a position that is still open
  are as good as new. So whatever has no stated law, such as candidates of a draft that were ranked with the target's
  noise, look-ups, or what a budget left of a tree, is `chosen`: then a token has the target's law given the tree.
- A plain sample would not do where there is no tree: whether there is one, and how deep the last one was, may
  follow from `Purpose.TOKEN` numbers, of this position too.
- `Draws` are tried first, in their order, and chosen children after them: which ones those are may depend on the draws,
  but what is emitted after a rejection of all draws does not depend on which children there are.
- The engine verifies what was drawn whole (`Speculator._shares`), and every call draws from numbers of its own
  (`draft_seed`), so that a draw has its law whatever happened in the steps before.

Requests with one seed share their numbers, here as everywhere. What they get together is no independent sample; and
where one of them has taught the engine how long its trees should be, the other's law is no longer exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import Executor, LogitEdits, LogitRows, StepResult, TokenBatch, TopLogprobs
from tokenloom.engine.plan import Plan
from tokenloom.engine.token_tree import ROOT, Draws, TokenTree
from tokenloom.kernels.backend import Kernels
from tokenloom.kernels.reference.sampler import TILE_ROWS, apply_edits, log_softmax
from tokenloom.kernels.reference.truncation import truncate
from tokenloom.kernels.spec import log_sum_exp
from tokenloom.kernels.spec_sampling import sanitized
from tokenloom.speculation.multi_step_sampling import verify

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(slots=True)
class _Case:
    """A token that is wanted at logit entry `entry`; the nodes of the tree below it have the entries behind it."""

    entry: int
    tree: TokenTree

    @property
    def entries(self) -> range:
        return range(self.entry, self.entry + 1 + len(self.tree))


class RejectionJudge:
    """`engine.speculator.Judge` for executors on these `kernels`, whose logprobs it returns bit for bit.

    top_p and min_p end where the reference ends them; the native kernels may end one token sooner or later, where a
    sum of probabilities meets top_p to ten digits.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._log_probabilities = _native_logprobs if kernels == "native" else _reference_logprobs

    def __call__(self, plan: Plan, batch: TokenBatch, result: StepResult, executor: Executor) -> None:
        tokens, logprobs, top = result.token_ids.copy(), result.logprobs.copy(), dict(result.top)
        entries = batch.logit_rows
        for cases in _tiles(plan):
            wanted = [entry for case in cases for entry in case.entries]
            logits = dict(zip(wanted, _fetch(executor, entries.rows[wanted]), strict=True))
            for case in cases:
                for entry, token in _verdict(case, entries, logits):
                    tokens[entry] = token
                    if entry in top:
                        values = self._log_probabilities(logits[entry])
                        logprobs[entry] = values[token]
                        best = top[entry]
                        top[entry] = TopLogprobs(best.token_ids, best.logprobs, _rank(values, token))
        result.token_ids, result.logprobs, result.top = tokens, logprobs, top


def sampled_law(
    logits: Float32,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    edits: LogitEdits | None = None,
) -> Float64:
    """What the sampler draws from where `temperature` > 0: probabilities, float64 [V], up to a factor. `logits` are
    the raw ones, fp32 [V]. All zeros if everything is excluded."""
    row = sanitized(logits)[None]
    if edits is not None:
        row = row.copy()
        apply_edits(row, np.zeros(1, np.intp), {0: edits})
        row = sanitized(row)
    best = row.max()
    if best == -np.inf:
        return np.zeros(len(logits))
    scores: Float32 = (row - best) / np.float32(temperature)
    # -0, from a quotient that underflows, would be ordered behind 0.
    scores += np.float32(0)
    truncate(
        scores, np.array([top_k], np.int32), np.array([top_p], np.float32), np.array([min_p], np.float32)
    )
    law: Float64 = np.exp(scores[0].astype(np.float64))
    return law


def _tiles(plan: Plan) -> Iterator[list[_Case]]:
    """The sequences to judge, in lists of at most `TILE_ROWS` rows, or one sequence."""
    cases: list[_Case] = []
    rows = 0
    for entry, (seq, target, path) in enumerate(plan.entries):
        if target >= 0 or path or not seq.request.is_judged:
            continue
        case = _Case(entry, plan.trees.get(seq) or TokenTree())
        if cases and rows + len(case.entries) > TILE_ROWS:
            yield cases
            cases, rows = [], 0
        cases.append(case)
        rows += len(case.entries)
    if cases:
        yield cases


def _fetch(executor: Executor, rows: NDArray[np.int32]) -> Iterator[Float32]:
    for begin in range(0, len(rows), TILE_ROWS):
        yield from executor.logits(rows[begin : begin + TILE_ROWS])


def _verdict(case: _Case, entries: LogitRows, logits: dict[int, Float32]) -> list[tuple[int, int]]:
    """(entry, token) along the path that was accepted, and of the token after it. That one is no child of the last
    node: a child that was rejected has no probability left."""
    tree = case.tree

    def target(node: int) -> Float64:
        entry = case.entry + 1 + node
        edits = entries.edits.get(entry)
        law = sampled_law(
            logits[entry],
            float(entries.temperatures[entry]),
            int(entries.top_k[entry]),
            float(entries.top_p[entry]),
            float(entries.min_p[entry]),
            edits,
        )
        if not law.any():
            # As the sampler does for a row that excludes everything.
            allowed = None if edits is None else edits.allowed_ids
            law[allowed.min() if allowed is not None and len(allowed) else 0] = 1.0
        return law

    verdict = verify(
        tree,
        target,
        _all_draws(tree),
        seed=int(entries.seeds[case.entry]),
        sample_index=int(entries.sample_index[case.entry]),
        position=int(entries.positions[case.entry]),
    )
    path = [ROOT, *verdict.nodes]
    tokens = [*(tree.tokens[node] for node in verdict.nodes), verdict.token]
    return [(case.entry + 1 + node, token) for node, token in zip(path, tokens, strict=True)]


def _all_draws(tree: TokenTree) -> dict[int, list[Draws]]:
    """The draws below each node, and after them the children that nobody drew."""
    drawn = {node for draws in tree.draws.values() for one in draws for node in one.nodes}
    found = {parent: list(draws) for parent, draws in tree.draws.items()}
    chosen: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        if node not in drawn:
            chosen.setdefault(parent, []).append(node)
    for parent, nodes in chosen.items():
        found.setdefault(parent, []).append(Draws("chosen", nodes))
    return found


def _rank(values: Float32, token: int) -> int:
    """The place of a token by (-value, id), from 1."""
    own = values[token]
    return 1 + int(np.count_nonzero(values > own)) + int(np.count_nonzero(values[:token] == own))


def _reference_logprobs(logits: Float32) -> Float32:
    values: Float32 = log_softmax(logits[None])[0]
    return values


def _native_logprobs(logits: Float32) -> Float32:
    best, log_total = log_sum_exp(logits)
    values: Float32 = np.zeros_like(logits) if best == -np.inf else (logits - best) - log_total
    return values
