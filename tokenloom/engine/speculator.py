"""From proposals to the trees of a step: ask, merge, choose, and learn from what came of it.

Nothing here changes an output. Each row of a tree samples with the noise of its own (seed, position), so the text
is that of plain decoding whatever was proposed (DESIGN.md, Noise); trees only change how many tokens a step commits.
Requests of the exactness class `distribution` are the exception: a `Judge` decides their tokens, by the same law.
How many rows are verified, and for whom, is decided as in Li et al., "AdaServe" (EuroSys 2026); see policies/pace.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

from tokenloom.clock import Clock, MonotonicClock
from tokenloom.engine.batch import PAGE_SIZE, Executor, StepResult, TokenBatch
from tokenloom.engine.plan import PlaceCounts, Plan, StepSpeculation
from tokenloom.engine.policies.acceptance import AcceptanceTable
from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.pace import (
    LEVEL_PRIOR,
    Pace,
    ShapeRule,
    TimePrice,
    choose_budget,
    expected_gains,
    needs_of,
)
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.proposer_state import LOOK_DEEPER, REST, TRY_MEMORY, ProposerState
from tokenloom.engine.request import Request
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import MAX_NODES, ROOT, TokenTree, merge
from tokenloom.errors import UnsupportedFeature

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


class Judge(Protocol):
    """Decides the tokens of sequences whose request `is_judged`; speculation/rejection_judge.py does."""

    def __call__(self, plan: Plan, batch: TokenBatch, result: StepResult, executor: Executor) -> None:
        """Rewrite tokens and logprobs of `result` along one path of each such sequence's tree, from its root on.
        The executor still has the logits of `batch`."""


class Speculator:
    """Gives decoding sequences of a plan their trees. Without proposers it leaves plans as they are.

    `clock` is the engine's. A proposer that raises is not asked again, and its error is logged: what it would have
    said changes no output. Without `judge`, requests that need one are refused.
    """

    def __init__(
        self,
        proposers: Seq[Proposer] = (),
        limits: SpeculationLimits | None = None,
        clock: Clock | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.sources = [ProposerState(proposer) for proposer in proposers]
        self.limits = limits or SpeculationLimits()
        self.curve = LatencyCurve()
        self.price = TimePrice()
        self.chances = AcceptanceTable()
        self.stats = SpeculationStats()
        self.vocab_size = 0
        """Of the engine, which sets it."""
        self._judge = judge
        self._step = StepSpeculation()
        self._step_places: dict[tuple[str, str, int], Acceptance] = {}
        self._levels = AcceptanceTable(ranks=MAX_NODES)
        self._clock = clock or MonotonicClock()
        self._shapes = ShapeRule(max_depth=self.limits.max_depth, max_width=self.limits.width)
        self._paces: dict[Sequence, Pace] = {}
        self._keys = 0
        self._propose_seconds = 0.0
        self._asked_seconds = self._chosen_seconds = 0.0
        self._own_seconds = 0.0
        """What choosing and learning take in a step with trees, on average."""
        self._rows_of_level = 1.0
        """Rows that are verified for each level of a tree, on average."""

    def check_request(self, request: Request) -> None:
        """Raise `UnsupportedFeature` for a request that needs a judge where there is none."""
        if request.is_judged and self.sources and self._judge is None:
            raise UnsupportedFeature(
                "exactness distribution", "this engine verifies token trees exactly only"
            )

    # --- before a step -----------------------------------------------------------------------------------

    def extend(self, plan: Plan, scheduler: Scheduler) -> None:
        """Hang trees below the decoding runs of `plan`, in rows and slots that nobody else needs."""
        if not self.sources:
            return
        began = self._clock.now()
        self._keys = sum(run.end for run in plan.runs)
        self._propose_seconds = 0.0
        self._step = StepSpeculation()
        self._step_places.clear()
        decoding = [
            run.seq
            for run in plan.runs
            if run.end - run.start == 1 and run.end == len(run.seq.tokens) and run.seq.num_output
        ]
        if not decoding:
            return
        awake = [number for number, source in enumerate(self.sources) if not source.rests()]
        if not awake:
            self.stats.skipped += 1
            self._step.skipped = True
            return
        for seq in decoding:
            self._pace_of(seq).begin(plan.now)
        room = min(self.limits.max_rows, scheduler.budget.max_batch_tokens - plan.num_rows)
        wanted = [seq for seq in decoding if seq.max_length - len(seq.tokens) > 1]
        shares = self._shares(scheduler, wanted, room)
        trees = self._trees(plan, wanted, awake, room, shares) if wanted and room > 0 else []
        if any(len(tree) for tree in trees):
            self._hang(plan, scheduler, wanted, trees, room)
            for number in awake if self.limits.pace == "adaptive" else ():
                if not self.sources[number].rested:
                    self.sources[number].asked(bool(plan.trees))
        for seq in shares.keys() - plan.trees.keys():
            scheduler.cache.release(seq.truncate(len(seq.tokens)))
        if plan.trees:
            self.stats.steps += 1
            self._propose_seconds = self._clock.now() - began
            self._chosen_seconds = self._propose_seconds - self._asked_seconds
        else:
            self.stats.skipped += 1
            self._step.skipped = True

    def _shares(self, scheduler: Scheduler, wanted: list[Sequence], room: int) -> dict[Sequence, int]:
        """Nodes that each proposer may draw for sequences that are judged; there are rows and slots for them.

        What is drawn has to be verified whole: that a draw is dropped because of what it is, or what lies below it,
        would change the law of those that stay. So this is settled before anything is drawn, and by counts alone.
        """
        shares: dict[Sequence, int] = {}
        for seq in wanted:
            if seq.request.is_judged:
                most = min(self.limits.max_nodes, MAX_NODES, room // len(wanted))
                share = _reserve(scheduler, seq, most) // len(self.sources)
                if share > 0:
                    shares[seq] = share
        return shares

    def _trees(
        self, plan: Plan, wanted: list[Sequence], awake: list[int], room: int, shares: dict[Sequence, int]
    ) -> list[TokenTree]:
        """What those proposers of `awake` that pay suggest for each of `wanted`, merged; nothing if none does."""
        parts: list[list[TokenTree]] = [[] for _ in wanted]
        self._asked_seconds = 0.0
        began = self._clock.now()
        for number in awake:
            source = self.sources[number]
            depth, width = self._shape(number, plan, wanted)
            if depth == 0:
                source.rested = 1
                continue
            source.rested = 0
            asked = [
                Wanted(
                    seq,
                    min(depth, seq.max_length - len(seq.tokens) - 1),
                    shares.get(seq, min(self.limits.max_nodes, MAX_NODES, room)),
                    width,
                    seq in shares,
                )
                for seq in wanted
            ]
            before = self._clock.now()
            try:
                proposals = source.proposer.propose(asked)
                trees = [self._tree(number, *pair) for pair in zip(proposals, asked, strict=True)]
            except Exception:
                source.failed = True
                log.exception("the proposer %s failed and is not asked any more", source.proposer.name)
                continue
            seconds = self._clock.now() - before
            self._asked_seconds += seconds
            source.took(depth, seconds)
            for part, tree in zip(parts, trees, strict=True):
                if source.gate.is_trying:
                    # By what is known of it, nothing would be verified, and that would never change.
                    tree.chances[:] = [1.0] * len(tree)
                part.append(tree)
        merged = [_best(merge(part), self.limits.max_nodes) for part in parts]
        self._propose_seconds = self._clock.now() - began
        return merged

    def _shape(self, number: int, plan: Plan, wanted: list[Sequence]) -> tuple[int, int]:
        """Levels and children that proposer `number` is asked for; no levels where drafting does not pay."""
        limits = self.limits
        if limits.pace == "fixed":
            return limits.max_depth, limits.width
        most, width = self._shapes.shape(len(wanted))
        adapters = {_learned_as(seq) for seq in wanted}
        gains = [expected_gains(self._levels, number, adapter, most) for adapter in adapters]
        source = self.sources[number]
        if source.is_hopeless:
            gains = [[0.0] * most]
        depth = source.gate.depth(
            [sum(level) / len(gains) for level in zip(*gains, strict=True)],
            self.curve,
            self._keys,
            requests=len(wanted),
            other_rows=plan.num_rows - len(wanted),
            level_seconds=[cost + self._own_seconds * (cost > 0) for cost in source.costs(most)],
            rows=[self._rows_of_level] * most,
            steps=max(source.rested, 1),
            price=self.price.rate,
        )
        source.calls += depth > 0
        if source.gate.is_trying:
            for table in (self.chances, self._levels):
                table.fade(number, TRY_MEMORY)
        elif depth and source.calls % LOOK_DEEPER == 0:
            # How often a level comes true is only learned where it is drafted.
            depth = min(depth + 1, most)
        return depth, width

    def _tree(self, number: int, proposal: Proposal, want: Wanted) -> TokenTree:
        """What proposer `number` suggests, without what lies too deep, behind the end of the text, or nowhere."""
        tree = TokenTree()
        stops = want.seq.stop_ids
        adapter = _learned_as(want.seq)
        kept = {ROOT: (ROOT, 0)}
        places: dict[int, int] = {}
        most = want.max_nodes if want.draws else MAX_NODES
        columns = zip(proposal.tokens, proposal.parents, proposal.ranks, proposal.confidences, strict=True)
        for node, (token, parent, rank, confidence) in enumerate(columns):
            found = kept.get(parent)
            if found is None or found[1] >= want.max_depth or len(tree) == most:
                continue
            if not 0 <= token < self.vocab_size:
                continue
            if token not in stops:
                kept[node] = (len(tree), found[1] + 1)
            places[node] = len(tree)
            tree.tokens.append(token)
            tree.parents.append(found[0])
            tree.chances.append(self.chances.chance(number, adapter, rank, confidence))
            tree.features.append(((number, rank, confidence),))
        if want.draws and proposal.draws:
            proposal.check_draws(want.max_nodes, self.vocab_size)
            # Below a node that was not kept, or at the greatest depth, nothing was.
            for parent, drawn in proposal.draws.items():
                if parent in kept and all(node in places for node in drawn.nodes):
                    nodes = [places[node] for node in drawn.nodes]
                    tree.draws[kept[parent][0]] = [drawn._replace(nodes=nodes)]
        return tree

    def _hang(
        self, plan: Plan, scheduler: Scheduler, wanted: list[Sequence], trees: list[TokenTree], room: int
    ) -> None:
        """Choose the nodes that are worth a row, and attach them. A tree with draws has its rows and slots."""
        drawn = sum(len(tree) for tree in trees if tree.draws)
        ranked = RankedTrees([TokenTree() if tree.draws else tree for tree in trees])
        budget = len(trees) + room - drawn
        needs = None
        other_rows = plan.num_rows - len(wanted) + drawn
        whole = min(budget, len(trees) + int(ranked.sizes.sum()))
        # What so many rows cost is tried a few times: a curve that is never asked stays wrong.
        if self.limits.pace == "adaptive" and (
            not self.curve.known or self.curve.has_seen(whole + other_rows)
        ):
            paces = [self._pace_of(seq) for seq in wanted]
            depth = max(max(tree.depths(), default=0) for tree in trees)
            remaining = [seq.max_length - len(seq.tokens) for seq in wanted]
            wish = needs_of(paces, plan.now, depth, remaining)
            budget, seconds = choose_budget(
                ranked,
                self.curve,
                self._keys,
                budget,
                other_rows=other_rows,
                overhead=self._propose_seconds,
                needs=wish,
                boost=self.limits.selection.boost,
                price=self.price.rate,
            )
            needs = wish.at(seconds)
        chosen = ranked.select(budget, needs, self.limits.selection)
        for seq, tree, nodes in zip(wanted, trees, chosen, strict=True):
            if tree.draws:
                plan.trees[seq] = tree
                plan.num_rows += len(tree)
                continue
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

    def judge(self, plan: Plan, batch: TokenBatch, result: StepResult, executor: Executor) -> None:
        """Have the tokens of requests of the class `distribution` decided, with trees and without: what they are
        drawn with must not have been seen by any proposer, and whether there is a tree may follow from what one saw.
        """
        if self._judge is not None and self.sources and any(run.seq.request.is_judged for run in plan.runs):
            self._judge(plan, batch, result, executor)

    def observe(self, plan: Plan, accepted: dict[Sequence, list[int]], seconds: float) -> None:
        """Learn from a step that took the executor `seconds`: `accepted` are the nodes of each tree that became
        tokens."""
        if not self.sources:
            return
        began = self._clock.now()
        if plan.trees:
            self._count(plan, accepted, seconds)
        if plan.trees or self.stats.skipped % REST == 0 or not self.curve.known:
            self.curve.observe(plan.num_rows, self._keys, seconds)
        roots, worth = 0, 0.0
        for seq, _, end in plan.runs:
            if seq in self._paces and end > seq.num_prompt:
                tokens = 1 + len(accepted.get(seq, ()))
                self._paces[seq].produced += tokens
                is_promised = self._paces[seq].tpot < inf and self.limits.selection.boost < inf
                worth += tokens * (self.limits.selection.boost if is_promised else 1.0)
                roots += 1
        if roots and self.curve.known:
            verified = roots + sum(len(tree) for tree in plan.trees.values())
            alone = min(self.curve.seconds(verified, self._keys), seconds)
            took = (alone if verified < plan.num_rows else seconds) + self._propose_seconds
            self.price.observe(worth, took)
        if plan.trees:
            own = self._chosen_seconds + self._clock.now() - began
            self._own_seconds += (0.1 if self._own_seconds else 1.0) * (own - self._own_seconds)

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
            depths = tree.depths()
            self._learn(seq, tree, nodes, depths)
            rows = len(tree) / max(depths)
            self._rows_of_level += 0.05 * (rows - self._rows_of_level)
        step.num_trees = len(plan.trees)
        if self.curve.known:
            num_nodes = sum(len(tree) for tree in plan.trees.values())
            plain = self.curve.seconds(plan.num_rows - num_nodes, self._keys)
            gained = plain * guessed / len(plan.trees)
            step.seconds_saved = gained + plain - seconds - self._propose_seconds
            stats.seconds_saved += step.seconds_saved

    def _learn(self, seq: Sequence, tree: TokenTree, nodes: list[int], depths: list[int]) -> None:
        adapter = _learned_as(seq)
        taken = {ROOT, *nodes}
        # Where the text ended, nobody knows what would have followed.
        last = nodes[-1] if nodes else ROOT
        ended = seq.finish_reason is not None
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
            place = (self.sources[number].proposer.name, seq.request.adapter, depth)
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


def _learned_as(seq: Sequence) -> str:
    """What stands for the adapter where acceptance is learned: rejection accepts more, and other nodes."""
    return seq.request.adapter + ("/judged" if seq.request.is_judged else "")


def _best(tree: TokenTree, most: int) -> TokenTree:
    """The `most` nodes that are likeliest to be reached: a child never is more than its parent, so they hang
    together. A tree with draws has no more of them than were asked for, and is left whole."""
    if len(tree) <= most or tree.draws:
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
