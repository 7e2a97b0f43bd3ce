"""The loop of a draft model: catch up with the committed tokens, then grow a token tree level by level.

A level is one batch over all sequences. The tree is a beam search: each frontier node offers its best
continuations, and the most probable paths of a sequence are its next frontier. Candidates are ranked with the
very noise that the target will draw with, so that both choose alike wherever their distributions are close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, LogitRows, TokenBatch, Work
from tokenloom.engine.proposer import Proposal
from tokenloom.engine.token_tree import Draws
from tokenloom.kernels.backend import Backend
from tokenloom.kernels.draft_work import MAX_CANDIDATES, DraftWork
from tokenloom.kernels.native.backend import NativeBackend
from tokenloom.kernels.noise import MAX_GUMBEL, MIN_GUMBEL, Purpose, gumbel, token_bits, vocabulary_bits
from tokenloom.kernels.reference.sampler import TILE_ROWS, apply_edits
from tokenloom.kernels.reference.truncation import truncate
from tokenloom.kernels.spec_sampling import sanitized

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_NOISE_RANGE = np.float32(MAX_GUMBEL - MIN_GUMBEL + 1)
_CLOSE = np.float64(1e-9)


def draft(backend: Backend, work: DraftWork) -> list[Proposal]:
    """One proposal per sequence of `work`, empty where its depth is 0.

    Level 1 has the `width` best candidates of the root. For each further level the rows of the frontier's nodes
    are computed, and of their `MAX_CANDIDATES` best candidates each, the `width` best by confidence of the path
    (product of confidences, float64) become the next frontier; ties go to the lower beam, then to the better
    rank. Beam b is the b-th of the frontier in this order, which is also the order of a level in the proposal.

    Candidates of a row are tokens that may be drawn (top_k, top_p and min_p as in the sampler), ranked by score,
    ties to the lowest id. At temperature 0 the score is the logit, and nothing is excluded; else it is
    (logit - max) / temperature plus the noise of the target's draw at that position. Edits of an entry hold as
    they are for all rows of its tree: tokens of the path are not counted. With s_r the r-th best score, the
    confidence of rank r is exp(s_r) over the sum of exp(s_j) of all candidates of the row. A row whose logits are
    all -inf has none.

    Trees of `work.draws` are not searched but drawn, whatever the confidences, since draws have their law only where
    none is dropped. The tokens of the best noisy scores are draws without replacement (the Gumbel-max trick; Kool et
    al., "Stochastic beams and where to find them", ICML 2019).

    Raises as `Backend.run`, and ValueError for work that is not legal, before anything is computed.
    """
    if isinstance(backend, NativeBackend) and not work.draws:
        return backend.draft(work)
    return draft_by_levels(backend, work)


class _Found(NamedTuple):
    """Candidates (token, confidence) of a row, best first; `law` is what they are draws from, where it is wanted."""

    candidates: list[tuple[int, float]]
    law: Float64 | None


@dataclass(slots=True)
class _Tree:
    """The tree of sequence `owner` while it grows behind `context` tokens. Per beam: its node, the confidence of the
    path to it, and the beam of its parent."""

    owner: int
    context: int
    depth: int
    width: int
    proposal: Proposal
    is_drawn: bool = False
    nodes: list[int] = field(default_factory=lambda: [-1])
    reaches: list[float] = field(default_factory=lambda: [1.0])
    origins: list[int] = field(default_factory=lambda: [0])

    def grow(self, found: Sequence[_Found]) -> None:
        """Add a level: `found` is what there is for each beam."""
        options = [
            (-reach * confidence, beam, rank)
            for beam, (reach, row) in enumerate(zip(self.reaches, found, strict=True))
            for rank, (_, confidence) in enumerate(row.candidates)
        ]
        proposal, nodes = self.proposal, self.nodes
        if self.is_drawn:
            each = self.width if nodes == [-1] else 1
            kept = [option for option in options if option[2] < each]
            self._state(found, kept)
        else:
            options.sort()
            kept = options[: self.width]
        for _, beam, rank in kept:
            token, confidence = found[beam].candidates[rank]
            proposal.tokens.append(token)
            proposal.parents.append(nodes[beam])
            proposal.ranks.append(rank)
            proposal.confidences.append(confidence)
        first = len(proposal.tokens) - len(kept)
        self.nodes = list(range(first, first + len(kept)))
        self.reaches = [-negative for negative, _, _ in kept]
        self.origins = [beam for _, beam, _ in kept]

    def _state(self, found: Sequence[_Found], kept: Sequence[tuple[float, int, int]]) -> None:
        """Say of which law the children are that are about to be added."""
        first = len(self.proposal.tokens)
        for beam, (_, law) in enumerate(found):
            children = [first + place for place, option in enumerate(kept) if option[1] == beam]
            if children:
                self.proposal.draws[self.nodes[beam]] = Draws("distinct", children, law)


def draft_by_levels(backend: Backend, work: DraftWork) -> list[Proposal]:
    """`draft` in steps of any backend."""
    work.check()
    entries = work.batch.logit_rows
    proposals = [Proposal() for _ in range(work.batch.num_segments)]
    growing = [
        _Tree(s, work.context_of(s), depth, width, proposals[s], s in work.draws)
        for s, (depth, width) in enumerate(zip(work.depths.tolist(), work.widths.tolist(), strict=True))
        if depth > 0
    ]
    rows = entries.rows[[tree.owner for tree in growing]]
    backend.run(replace(work.batch, logit_rows=_wanted_logits(rows)))
    level = 0
    while growing:
        owners = np.repeat([tree.owner for tree in growing], [len(tree.nodes) for tree in growing])
        found = _candidates(backend, rows, owners, work, level)
        begin = 0
        for tree in growing:
            end = begin + len(tree.nodes)
            tree.grow(found[begin:end])
            begin = end
        level += 1
        growing = [tree for tree in growing if tree.depth > level and tree.nodes]
        if growing:
            batch = _level_batch(work, growing, level)
            rows = batch.logit_rows.rows
            backend.run(batch)
    return proposals


def _level_batch(work: DraftWork, trees: Sequence[_Tree], level: int) -> TokenBatch:
    """The rows of the frontiers, whose nodes are at depth `level`: one segment per beam."""
    tokens: list[int] = []
    positions: list[int] = []
    tables: list[list[int]] = []
    adapters: list[int] = []
    copies: list[tuple[int, int]] = []
    for tree in trees:
        position = tree.context + level - 1
        full, used = divmod(tree.context, PAGE_SIZE)
        committed = work.batch.page_tables[tree.owner].tolist()
        scratch = work.scratch[tree.owner].tolist()
        last = position // PAGE_SIZE - full
        for beam, (node, origin) in enumerate(zip(tree.nodes, tree.origins, strict=True)):
            pages = scratch[beam][: last + 1]
            if level == 1 and used:
                copies.append((committed[full], pages[0]))
            elif level > 1 and origin != beam:
                written = -(-(used + level - 1) // PAGE_SIZE)
                copies += zip(scratch[origin][:written], pages, strict=False)
            tokens.append(tree.proposal.tokens[node])
            positions.append(position)
            tables.append(committed[:full] + pages)
            adapters.append(int(work.batch.adapter_slots[tree.owner]))
    count = len(tokens)
    places = np.array(positions, np.int32)
    page_tables = np.zeros((count, max(map(len, tables))), np.int32)
    for table, found in zip(page_tables, tables, strict=True):
        table[: len(found)] = found
    rows = np.arange(count, dtype=np.int32)
    own = page_tables[rows, places // PAGE_SIZE].astype(np.int64)
    return TokenBatch(
        token_ids=np.array(tokens, np.int32),
        positions=places,
        logical=places,
        slots=own * PAGE_SIZE + places % PAGE_SIZE,
        parents=np.full(count, -1, np.int32),
        starts=np.arange(count + 1, dtype=np.int32),
        context_lens=places,
        page_tables=page_tables,
        adapter_slots=np.array(adapters, np.int32),
        work=np.full(count, Work.DECODE, np.int8),
        logit_rows=_wanted_logits(rows),
        page_copies=np.array(copies, np.int32).reshape(-1, 2),
    )


def _wanted_logits(rows: NDArray[np.int32]) -> LogitRows:
    """Entries that make a step compute the logits of `rows`; what they draw is not looked at."""
    count = len(rows)
    return LogitRows(
        rows=rows,
        targets=np.full(count, -1, np.int32),
        temperatures=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seeds=np.zeros(count, np.uint64),
        sample_index=np.zeros(count, np.uint32),
        positions=np.zeros(count, np.int64),
        num_logprobs=np.full(count, -1, np.int32),
    )


def _candidates(
    backend: Backend, rows: NDArray[np.int32], owners: NDArray[np.intp], work: DraftWork, level: int
) -> list[_Found]:
    """The best candidates of each row. Row i is `level` tokens below the root of the sequence owners[i]."""
    found: list[_Found] = []
    entries = work.batch.logit_rows
    for begin in range(0, len(rows), TILE_ROWS):
        part = owners[begin : begin + TILE_ROWS]
        logits = sanitized(backend.logits(rows[begin : begin + TILE_ROWS]))
        apply_edits(logits, part, entries.edits)
        logits = sanitized(logits)
        for row, entry in zip(logits, part.tolist(), strict=True):
            law = np.zeros(work.law_size) if entry in work.draws else None
            tokens, scores = _best(row if law is None else row[: len(law)], entry, entries, level, law)
            found.append(_Found(list(zip(tokens.tolist(), _confidences(scores), strict=True)), law))
    return found


def _confidences(scores: Float64) -> list[float]:
    if not len(scores):
        return []
    shares = np.exp(scores - scores[0])
    # Added in the order of ranks, which numpy's own sum does not promise.
    confidences: list[float] = (shares / np.cumsum(shares)[-1]).tolist()
    return confidences


def _best(
    logits: Float32, entry: int, entries: LogitRows, level: int, law: Float64 | None
) -> tuple[NDArray[np.intp], Float64]:
    """Tokens and scores of the best candidates of one row of edited logits, fp32 [V]. `law`, float64 of at least V
    zeros, is filled with what their noise draws from."""
    best = logits.max()
    if best == -np.inf:
        return np.zeros(0, np.intp), np.zeros(0)
    if not entries.temperatures[entry] > 0:
        tokens = _leaders(logits, np.float32(0))
        return _ranked(tokens, logits[tokens].astype(np.float64))
    one = slice(entry, entry + 1)
    scores = (logits - best)[None] / entries.temperatures[entry]
    # -0, from a quotient that underflows, would be ordered behind 0.
    scores += np.float32(0)
    truncate(scores, entries.top_k[one], entries.top_p[one], entries.min_p[one])
    if law is not None:
        law[: len(logits)] = np.exp(scores[0].astype(np.float64))
    # Whoever is this far behind the last of the best before any noise cannot be among them behind it.
    tokens = _leaders(scores[0], _NOISE_RANGE)
    positions = entries.positions[one] + level
    seeds, samples = entries.seeds[one], entries.sample_index[one]
    if 4 * len(tokens) > len(logits):
        bits = vocabulary_bits(seeds, samples, positions, len(logits), Purpose.TOKEN)[0, tokens]
    else:
        bits = token_bits(seeds, samples, positions, tokens, Purpose.TOKEN)
    values = scores[0, tokens].astype(np.float64)
    # The library's logarithms are fast and the specified ones the same everywhere; they differ by a few units in the
    # last place, so that only those who come close need the latter.
    close = _leaders(values - np.log(-np.log((bits + 0.5) * 2.0**-32)), _CLOSE)
    return _ranked(tokens[close], values[close] + gumbel(bits[close]))


def _leaders(scores: NDArray[np.floating[Any]], margin: np.floating[Any]) -> NDArray[np.intp]:
    """Places, ascending, with a score of at least the `MAX_CANDIDATES`-th best less `margin`; never one of -inf."""
    if len(scores) <= MAX_CANDIDATES:
        return np.flatnonzero(scores > -np.inf)
    bound = np.partition(scores, -MAX_CANDIDATES)[-MAX_CANDIDATES] - margin
    return np.flatnonzero((scores >= bound) & (scores > -np.inf))


def _ranked(tokens: NDArray[np.intp], scores: Float64) -> tuple[NDArray[np.intp], Float64]:
    """The best by (-score, token)."""
    order = np.lexsort((tokens, -scores))[:MAX_CANDIDATES]
    return tokens[order], scores[order]
