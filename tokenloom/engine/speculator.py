"""From proposals to the trees of a step: ask, merge, choose, and learn from what came of it.

Nothing here changes an output. Each row of a tree samples with the noise of its own (seed, position), so the text
is that of plain decoding whatever was proposed (DESIGN.md, Noise); trees only change how many tokens a step commits.
How many rows are verified, and for whom, is decided as in Li et al., "AdaServe" (EuroSys 2026); see policies/pace.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

from tokenloom.clock import Clock, MonotonicClock
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.plan import PlaceCounts, Plan, StepSpeculation
from tokenloom.engine.policies.acceptance import AcceptanceTable
from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.pace import (
    LEVEL_PRIOR,
    DraftGate,
    Pace,
    ShapeRule,
    choose_budget,
    expected_gains,
    needs_of,
)
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import MAX_NODES, ROOT, TokenTree, merge

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationLimits:
    """Bounds of what is proposed and verified: levels and nodes of one tree, children of one node, and rows of all
    trees in a step. With `pace` "fixed" these are what is done in every step, whether it pays or not."""

    max_depth: int = 8
    max_nodes: int = 16
    width: int = 3
    max_rows: int = 64
    pace: Literal["adaptive", "fixed"] = "adaptive"
    selection: SelectionPolicy = FULL


@dataclass(slots=True)
class Acceptance:
    """Nodes of a proposer (by depth) whose parent became a token, and how many of them became one too."""

    tested: int = 0
    accepted: int = 0


@dataclass(slots=True)
class SpeculationStats:
    """Counts since the start. `by_place` has (name of the proposer, adapter, depth from 1); a node that several
    proposers suggested counts for each. `steps` had trees, `skipped` had none though sequences decoded.
    `seconds_saved` is what plain steps would have taken for the tokens that were guessed right, by the latency
    curve, less what verifying and proposing took."""

    num_drafted: int = 0
    num_accepted: int = 0
    steps: int = 0
    skipped: int = 0
    seconds_saved: float = 0.0
    by_place: dict[tuple[str, str, int], Acceptance] = field(default_factory=dict)


class _Source:
    """A proposer, whether it pays, and what its proposals cost."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.gate = DraftGate()
        self.level_seconds = 0.0
        self.failed = False

    def took(self, levels: int, seconds: float) -> None:
        """A call for `levels` levels took `seconds`."""
        found = seconds / max(levels, 1)
        self.level_seconds += (0.1 if self.level_seconds else 1.0) * (found - self.level_seconds)


class Speculator:
    """Gives decoding sequences of a plan their trees. Without proposers it leaves plans as they are.

    `clock` is the engine's. A proposer that raises is not asked again, and its error is logged: what it would have
    said changes no output.
    """

    def __init__(
        self,
        proposers: Seq[Proposer] = (),
        limits: SpeculationLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.sources = [_Source(proposer) for proposer in proposers]
        self.limits = limits or SpeculationLimits()
        self.curve = LatencyCurve()
        self.chances = AcceptanceTable()
        self.stats = SpeculationStats()
        self._step = StepSpeculation()
        self._step_places: dict[tuple[str, str, int], Acceptance] = {}
        self._levels = AcceptanceTable(ranks=MAX_NODES)
        self._clock = clock or MonotonicClock()
        self._shapes = ShapeRule(max_depth=self.limits.max_depth, max_width=self.limits.width)
        self._paces: dict[Sequence, Pace] = {}
        self._keys = 0
        self._propose_seconds = 0.0

    # --- before a step -----------------------------------------------------------------------------------

    def extend(self, plan: Plan, scheduler: Scheduler) -> None:
        """Hang trees below the decoding runs of `plan`, in rows and slots that nobody else needs."""
        if not self.sources:
            return
        self._keys = sum(run.end for run in plan.runs)
        self._propose_seconds = 0.0
        self._step = StepSpeculation()
        self._step_places.clear()
        decoding = [
            run.seq
            for run in plan.runs
            if run.end - run.start == 1 and run.end == len(run.seq.tokens) and run.seq.num_output
        ]
        for seq in decoding:
            self._pace_of(seq).begin(plan.now)
        room = min(self.limits.max_rows, scheduler.budget.max_batch_tokens - plan.num_rows)
        wanted = [seq for seq in decoding if seq.max_length - len(seq.tokens) > 1]
        trees = self._trees(plan, wanted, room) if wanted and room > 0 else []
        if any(len(tree) for tree in trees):
            self._hang(plan, scheduler, wanted, trees, room)
        if plan.trees:
            self.stats.steps += 1
        elif decoding:
            self.stats.skipped += 1
            self._step.skipped = True

    def _trees(self, plan: Plan, wanted: list[Sequence], room: int) -> list[TokenTree]:
        """What the proposers that pay suggest for each of `wanted`, merged."""
        proposals: list[tuple[int, list[Wanted], Seq[Proposal]]] = []
        began = self._clock.now()
        for number, source in enumerate(self.sources):
            depth, width = self._shape(number, plan, wanted)
            if depth == 0 or source.failed:
                continue
            asked = [
                Wanted(
                    seq,
                    min(depth, seq.max_length - len(seq.tokens) - 1),
                    min(self.limits.max_nodes, MAX_NODES, room),
                    width,
                )
                for seq in wanted
            ]
            before = self._clock.now()
            try:
                proposals.append((number, asked, source.proposer.propose(asked)))
            except Exception:
                source.failed = True
                log.exception("the proposer %s failed and is not asked any more", source.proposer.name)
            source.took(depth, self._clock.now() - before)
        trees = [
            merge([self._tree(number, suggested[i], asked[i]) for number, asked, suggested in proposals])
            for i in range(len(wanted))
        ]
        trees = [_best(tree, self.limits.max_nodes) for tree in trees]
        self._propose_seconds = self._clock.now() - began
        return trees

    def _shape(self, number: int, plan: Plan, wanted: list[Sequence]) -> tuple[int, int]:
        """Levels and children that proposer `number` is asked for; no levels where drafting does not pay."""
        limits = self.limits
        if limits.pace == "fixed":
            return limits.max_depth, limits.width
        depth, width = self._shapes.shape(len(wanted))
        adapters = {seq.request.adapter for seq in wanted}
        gains = [expected_gains(self._levels, number, adapter, depth) for adapter in adapters]
        source = self.sources[number]
        return source.gate.depth(
            [sum(level) / len(gains) for level in zip(*gains, strict=True)],
            self.curve,
            self._keys,
            requests=len(wanted),
            other_rows=plan.num_rows - len(wanted),
            level_seconds=source.level_seconds,
        ), width

    def _tree(self, number: int, proposal: Proposal, want: Wanted) -> TokenTree:
        """What proposer `number` suggests, without what lies too deep or behind the end of the text."""
        tree = TokenTree()
        stops = want.seq.stop_ids
        adapter = want.seq.request.adapter
        kept = {ROOT: (ROOT, 0)}
        columns = zip(proposal.tokens, proposal.parents, proposal.ranks, proposal.confidences, strict=True)
        for node, (token, parent, rank, confidence) in enumerate(columns):
            found = kept.get(parent)
            if found is None or found[1] >= want.max_depth or len(tree) == MAX_NODES:
                continue
            if token not in stops:
                kept[node] = (len(tree), found[1] + 1)
            tree.tokens.append(token)
            tree.parents.append(found[0])
            tree.chances.append(self.chances.chance(number, adapter, rank, confidence))
            tree.features.append(((number, rank, confidence),))
        return tree

    def _hang(
        self, plan: Plan, scheduler: Scheduler, wanted: list[Sequence], trees: list[TokenTree], room: int
    ) -> None:
        """Choose the nodes that are worth a row, and attach them."""
        ranked = RankedTrees(trees)
        budget = len(trees) + room
        needs = None
        if self.limits.pace == "adaptive":
            paces = [self._pace_of(seq) for seq in wanted]
            depth = max(max(tree.depths(), default=0) for tree in trees)
            wish = needs_of(paces, plan.now, depth)
            budget, seconds = choose_budget(
                ranked,
                self.curve,
                self._keys,
                budget,
                other_rows=plan.num_rows - len(wanted),
                overhead=self._propose_seconds,
                needs=wish,
            )
            needs = wish.at(seconds)
        chosen = ranked.select(budget, needs, self.limits.selection)
        for seq, tree, nodes in zip(wanted, trees, chosen, strict=True):
            nodes = nodes[: _reserve(scheduler, seq, len(nodes))]
            if nodes:
                plan.trees[seq] = tree.keep(nodes)
                plan.num_rows += len(nodes)

    def _pace_of(self, seq: Sequence) -> Pace:
        pace = self._paces.get(seq)
        if pace is None:
            pace = self._paces[seq] = Pace(seq.request.slo.tpot)
        return pace

    # --- after a step ------------------------------------------------------------------------------------

    def observe(self, plan: Plan, accepted: dict[Sequence, list[int]], seconds: float) -> None:
        """Learn from a step that took the executor `seconds`: `accepted` are the nodes of each tree that became
        tokens."""
        if not self.sources:
            return
        if plan.trees:
            self._count(plan, accepted, seconds)
        self.curve.observe(plan.num_rows, self._keys, seconds)
        for seq, _, end in plan.runs:
            if seq in self._paces and end > seq.num_prompt:
                self._paces[seq].produced += 1 + len(accepted.get(seq, ()))

    def _count(self, plan: Plan, accepted: dict[Sequence, list[int]], seconds: float) -> None:
        stats, step = self.stats, self._step
        guessed = 0
        for seq, tree in plan.trees.items():
            nodes = accepted.get(seq, [])
            guessed += len(nodes)
            stats.num_drafted += len(tree)
            stats.num_accepted += len(nodes)
            step.accepted_by_depth += [0] * (len(nodes) - len(step.accepted_by_depth))
            for depth in range(len(nodes)):
                step.accepted_by_depth[depth] += 1
            self._learn(seq, tree, nodes)
        step.num_trees = len(plan.trees)
        if self.curve.known:
            num_nodes = sum(len(tree) for tree in plan.trees.values())
            plain = self.curve.seconds(plan.num_rows - num_nodes, self._keys)
            gained = plain * guessed / len(plan.trees)
            step.seconds_saved = gained + plain - seconds - self._propose_seconds
            stats.seconds_saved += step.seconds_saved

    def _learn(self, seq: Sequence, tree: TokenTree, nodes: list[int]) -> None:
        adapter = seq.request.adapter
        taken = {ROOT, *nodes}
        # Where the text ended, nobody knows what would have followed.
        last = nodes[-1] if nodes else ROOT
        ended = seq.finish_reason is not None
        depths = tree.depths()
        levels: dict[tuple[int, int], bool] = {}
        for node, parent in enumerate(tree.parents):
            if parent not in taken or (ended and parent == last):
                continue
            hit = node in taken
            for number, rank, confidence in tree.features[node]:
                self.chances.observe(number, adapter, rank, confidence, hit)
                level = (number, depths[node])
                levels[level] = levels.get(level, False) or hit
        for (number, depth), hit in levels.items():
            self._levels.observe(number, adapter, depth - 1, LEVEL_PRIOR, hit)
            place = (self.sources[number].proposer.name, adapter, depth)
            for places in (self.stats.by_place, self._step_places):
                found = places.get(place)
                if found is None:
                    found = places[place] = Acceptance()
                found.tested += 1
                found.accepted += hit

    def report(self) -> StepSpeculation | None:
        """What the last step did; None without proposers."""
        if not self.sources:
            return None
        self._step.places = [
            PlaceCounts(*place, found.tested, found.accepted) for place, found in self._step_places.items()
        ]
        return self._step

    def forget(self, seq: Sequence) -> None:
        """`seq` has stopped running. One that was preempted starts anew on its pace: its client has seen the pause,
        and chasing it would take the rows of all others."""
        for source in self.sources:
            source.proposer.forget(seq)
        self._paces.pop(seq, None)

    def close(self) -> None:
        """Release what the proposers hold."""
        for source in self.sources:
            source.proposer.close()


def _best(tree: TokenTree, most: int) -> TokenTree:
    """The `most` nodes that are likeliest to be reached: a child never is more than its parent, so they hang
    together."""
    if len(tree) <= most:
        return tree
    reaches = tree.reaches()
    return tree.keep(sorted(sorted(range(len(tree)), key=lambda node: (-reaches[node], node))[:most]))


def _reserve(scheduler: Scheduler, seq: Sequence, num_nodes: int) -> int:
    """Have slots behind the last token of `seq` for nodes of a tree: for how many, at most `num_nodes`. Nobody is
    preempted for them, and a page for everybody who runs stays available."""
    cache, table = scheduler.cache, scheduler.table.pages
    length = len(seq.tokens)
    num_nodes = min(num_nodes, table.shape[1] * PAGE_SIZE - length)
    while num_nodes > 0 and seq.num_pages_missing(length + num_nodes) > 0:
        page = cache.allocate() if cache.num_available > len(scheduler.running) else None
        if page is None:
            break
        table[seq.row, len(seq.pages)] = page
        seq.pages.append(page)
    return max(min(num_nodes, len(seq.pages) * PAGE_SIZE - length), 0)
