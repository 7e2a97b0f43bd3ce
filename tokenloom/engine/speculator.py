"""From proposals to the trees of a step: ask, merge, choose, and learn from what came of it.

Nothing here changes an output. Each row of a tree samples with the noise of its own (seed, position), so the text
is that of plain decoding whatever was proposed (DESIGN.md, Noise); trees only change how many tokens a step commits.
Requests of the exactness class `distribution` are the exception: a `Judge` decides their tokens, by the same law.
How many rows are verified, and for whom, is decided as in Li et al., "AdaServe" (EuroSys 2026); see policies/pace.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import inf
from operator import index
from typing import Final, Literal, Protocol

from tokenloom.clock import Clock, MonotonicClock
from tokenloom.engine.batch import PAGE_SIZE, Executor, StepResult, TokenBatch
from tokenloom.engine.plan import PlaceCounts, Plan, StepSpeculation
from tokenloom.engine.policies.acceptance import AcceptanceTable
from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.pace import (
    TRIAL_REQUESTS,
    Needs,
    Pace,
    ShapeRule,
    TimePrice,
    choose_budget,
    needs_of,
)
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.proposer_state import LOOK_DEEPER, REST, TRY_MEMORY, ProposerState, learn_levels, usual
from tokenloom.engine.request import Request
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import MAX_NODES, ROOT, TokenTree, merge
from tokenloom.errors import UnsupportedFeature

MAX_PLACES: Final = 4096
"""Of (proposer, adapter, depth), the last observed ones: adapters come and go."""

_HOPE: Final = 3.0
"""Tokens a step that a request may hope for at best, when the question is whether its SLO can still be kept."""


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
    """Counts since the start. `by_place` has (name of the proposer, adapter, depth from 1), at most `MAX_PLACES`; a
    node that several proposers suggested counts for each. `steps` had trees, `skipped` had none though sequences
    decoded. `seconds_saved` is what plain steps would have taken for the tokens that were guessed right, by the
    latency curve, less what verifying and proposing took."""

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
        self._clock = clock or MonotonicClock()
        self._shapes = ShapeRule(
            verify_rows=2 * self.limits.max_rows,
            max_depth=self.limits.max_depth,
            max_width=self.limits.width,
        )
        policy = self.limits.selection
        self._boost = policy.boost if policy.serve_needs and policy.boost < inf else 1.0
        """Weight of a token that a need asks for; where needs go first whatever they cost, nothing is weighed."""
        self._paces: dict[Sequence, Pace] = {}
        self._decoding: list[Sequence] = []
        """Of this step; `_wanted` are those that may be given a tree."""
        self._wanted: list[Sequence] = []
        self._wish: Needs | None = None
        """What those of `_wanted` need in this step; None if nobody has an SLO."""
        self._keys = 0
        self._propose_seconds = self._asked_seconds = self._chosen_seconds = 0.0
        self._own_seconds = 0.0
        """What choosing and learning take in a step with trees, on average."""

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
        self._wish = None
        for source in self.sources:
            source.asked = 0
        self._decoding = decoding = [
            run.seq
            for run in plan.runs
            if run.end - run.start == 1 and run.end == len(run.seq.tokens) and run.seq.num_output
        ]
        if not decoding:
            return
        for seq in decoding:
            self._pace_of(seq).begin(plan.now)
        self._wanted = wanted = [seq for seq in decoding if seq.max_length - len(seq.tokens) > 1]
        self._wish_for(plan, wanted)
        awake = [number for number, source in enumerate(self.sources) if not source.rests()]
        if not awake:
            self.stats.skipped += 1
            self._step.skipped = True
            return
        room = min(self.limits.max_rows, scheduler.budget.max_batch_tokens - plan.num_rows)
        shares = self._shares(scheduler, wanted, room)
        trees = self._trees(plan, wanted, awake, room, shares) if wanted and room > 0 else []
        if any(len(tree) for tree in trees):
            self._hang(plan, scheduler, wanted, trees, room)
        for seq in shares.keys() - plan.trees.keys():
            scheduler.cache.release(seq.truncate(len(seq.tokens)))
        if plan.trees:
            self.stats.steps += 1
            self._propose_seconds = self._clock.now() - began
            self._chosen_seconds = self._propose_seconds - self._asked_seconds
        else:
            self.stats.skipped += 1
            self._step.skipped = True

    def _wish_for(self, plan: Plan, wanted: list[Sequence]) -> None:
        """What each of `wanted` needs in this step, if anybody has an SLO that counts."""
        paces = [self._paces[seq] for seq in wanted]
        if not self.limits.selection.serve_needs or all(pace.tpot == inf for pace in paces):
            return
        remaining = [seq.max_length - len(seq.tokens) for seq in wanted]
        fastest = self.curve.seconds(plan.num_rows, self._keys) / _HOPE
        self._wish = needs_of(paces, plan.now, MAX_NODES, remaining, fastest)

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
                source.pause(is_long=plan.num_rows == len(self._decoding))
                continue
            # What comes of it in a few requests says enough of one that is only tried.
            some = wanted[-TRIAL_REQUESTS:] if source.gate.is_trying and self.curve.known else wanted
            source.asks(depth, len(some))
            asked = [
                Wanted(
                    seq,
                    min(depth, seq.max_length - len(seq.tokens) - 1),
                    shares.get(seq, min(self.limits.max_nodes, MAX_NODES, room)),
                    width,
                    seq in shares,
                )
                for seq in some
            ]
            before = self._clock.now()
            try:
                proposals = source.proposer.propose(asked)
                trees = [self._tree(number, *pair) for pair in zip(proposals, asked, strict=True)]
            except Exception:
                source.fail()
                continue
            seconds = self._clock.now() - before
            self._asked_seconds += seconds
            if len(some) == len(wanted):
                source.took(depth, seconds)
            for part, tree in zip(parts[-len(some) :], trees, strict=True):
                if source.gate.is_trying:
                    # By what is known of it nothing would be verified, and that would never change.
                    tree.reaches[:] = [1.0] * len(tree)
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
        source = self.sources[number]
        values, rows = source.levels(most)
        depth = source.gate.depth(
            values,
            self.curve,
            self._keys,
            requests=len(wanted),
            other_rows=plan.num_rows - len(wanted),
            level_seconds=[cost + self._own_seconds * (cost > 0) for cost in source.costs(most)],
            rows=rows,
            steps=max(source.rested, 1),
            price=self.price.rate,
        )
        source.known = 0 if source.gate.is_trying else depth
        if source.gate.is_trying:
            self.chances.fade(number, TRY_MEMORY)
        elif depth and source.calls % LOOK_DEEPER == 0:
            # How often a level comes true is only learned where it is drafted.
            depth = min(depth + 1, most)
        return depth, width

    def _tree(self, number: int, proposal: Proposal, want: Wanted) -> TokenTree:
        """What proposer `number` suggests, without what lies too deep, behind the end of the text, or nowhere."""
        tree = TokenTree()
        tokens, reaches = tree.tokens, tree.reaches
        stops, adapter = want.seq.stop_ids, _learned_as(want.seq)
        kept = {ROOT: (ROOT, 0, 1.0)}
        places: dict[int, int] = {}
        most = want.max_nodes if want.draws else MAX_NODES
        said = proposal.tokens, proposal.parents, map(index, proposal.ranks), proposal.confidences
        for node, (token, parent, rank, confidence) in enumerate(zip(*said, strict=True)):
            above, depth, reach = kept.get(parent, (ROOT, want.max_depth, 0.0))
            place = len(tokens)
            if depth >= want.max_depth or place == most or not 0 <= token < self.vocab_size:
                continue
            reach *= self.chances.chance(number, adapter, rank, confidence)
            if token not in stops:
                kept[node] = (place, depth + 1, reach)
            places[node] = place
            tokens.append(token)
            tree.parents.append(above)
            reaches.append(reach)
            tree.features.append(((number, rank, confidence),))
        if want.draws and proposal.draws:
            proposal.check_draws(want.max_nodes, self.vocab_size)
            # Below a node that was not kept, or at the greatest depth, nothing was.
            for parent, drawn in proposal.draws.items():
                if parent in kept and all(node in places for node in drawn.nodes):
                    nodes = [places[node] for node in drawn.nodes]
                    tree.draws[kept[parent][0]] = [drawn._replace(nodes=nodes)]
        # Below two siblings with one token, a judge would walk down the one and the commit the other.
        is_legal = len(set(tokens)) == len(tokens) or len(tree.children()) == len(tokens)
        return tree if is_legal else merge((tree, TokenTree()))

    def _hang(
        self, plan: Plan, scheduler: Scheduler, wanted: list[Sequence], trees: list[TokenTree], room: int
    ) -> None:
        """Choose the nodes that are worth a row, and attach them. A tree with draws has its rows and slots."""
        drawn = sum(len(tree) for tree in trees if tree.draws)
        ranked = RankedTrees([TokenTree() if tree.draws else tree for tree in trees])
        budget = len(trees) + room - drawn
        needs = None
        other_rows = plan.num_rows - len(wanted) + drawn
        whole = min(budget, len(trees) + len(ranked.reaches))
        # What so many rows cost is tried a few times: a curve that is never asked stays wrong.
        if self.limits.pace == "adaptive" and (
            not self.curve.known or self.curve.has_seen(whole + other_rows)
        ):
            wish = self._wish
            if wish is not None:
                wish = wish._replace(most=1.0 + max(max(tree.depths(), default=0) for tree in trees))
            budget, seconds = choose_budget(
                ranked,
                self.curve,
                self._keys,
                budget,
                other_rows=other_rows,
                overhead=self._propose_seconds,
                needs=wish,
                boost=self._boost,
                price=self.price.rate,
            )
            needs = None if wish is None else wish.at(seconds)
        chosen = ranked.select(budget, needs, self.limits.selection)
        for seq, tree, nodes in zip(wanted, trees, chosen, strict=True):
            if tree.draws:
                plan.trees[seq] = tree
                plan.num_rows += len(tree)
                continue
            nodes = nodes[: _reserve(scheduler, seq, len(nodes))]
            if nodes:
                plan.trees[seq] = tree if len(nodes) == len(tree) else tree.keep(nodes)
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
        took = seconds + self._propose_seconds
        needs: dict[Sequence, float] = {}
        if self._wish is not None:
            needs = dict(zip(self._wanted, self._wish.at(took).tolist(), strict=True))
        if plan.trees:
            self._count(plan, accepted, seconds)
        if self.limits.pace == "adaptive":
            learn_levels(self.sources, plan.trees, accepted, needs, self._boost)
        if plan.trees or self.stats.skipped % REST == 0 or not self.curve.known:
            self.curve.observe(plan.num_rows, self._keys, seconds)
        worth = 0.0
        for seq in self._decoding:
            tokens = 1 + len(accepted.get(seq, ()))
            worth += tokens + (self._boost - 1) * min(tokens, max(needs.get(seq, 0.0), 0.0))
            if seq in self._paces:  # whoever has ended is forgotten already
                self._paces[seq].produced += tokens
        roots = len(self._decoding)
        if roots and self.curve.known:
            verified = roots + sum(len(tree) for tree in plan.trees.values())
            alone = min(self.curve.seconds(verified, self._keys), seconds)
            took = (alone if verified < plan.num_rows else seconds) + self._propose_seconds
            self.price.observe(worth, took)
        if plan.trees:
            own = self._chosen_seconds + self._clock.now() - began
            self._own_seconds = usual(self._own_seconds or own, own)

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
            self._learn(seq, tree, nodes, tree.depths())
        step.num_trees = len(plan.trees)
        if self.curve.known:
            num_nodes = sum(len(tree) for tree in plan.trees.values())
            plain = self.curve.seconds(plan.num_rows - num_nodes, self._keys)
            # A plain step makes a token for everybody who decodes, and the later ones have no prompts beside them.
            gained = self.curve.seconds(len(self._decoding), self._keys) * guessed / len(self._decoding)
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
            place = (self.sources[number].proposer.name, seq.request.adapter, depth)
            for places in (self.stats.by_place, self._step_places):
                found = places[place] = places.pop(place, Acceptance())
                found.tested += 1
                found.accepted += hit
            if len(self.stats.by_place) > MAX_PLACES:
                del self.stats.by_place[next(iter(self.stats.by_place))]

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
            source.forget(seq)
        self._paces.pop(seq, None)

    def close(self) -> None:
        """Release what the proposers hold."""
        for source in self.sources:
            source.close()


def _learned_as(seq: Sequence) -> str:
    """What stands for the adapter where acceptance is learned: rejection accepts more, and other nodes."""
    return seq.request.adapter + ("/judged" if seq.request.is_judged else "")


def _best(tree: TokenTree, most: int) -> TokenTree:
    """The `most` nodes that are likeliest to be reached: a child never is more than its parent, so they hang
    together. A tree with draws has no more of them than were asked for, and is left whole."""
    if len(tree) <= most or tree.draws:
        return tree
    likely = sorted(range(len(tree)), key=lambda node: -tree.reaches[node])
    return tree.keep(sorted(likely[:most]))


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
