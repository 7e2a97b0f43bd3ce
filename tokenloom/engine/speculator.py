"""From proposals to the trees of a step: ask, merge, choose, and learn from what came of it.

Nothing here changes an output. Each row of a tree samples with the noise of its own (seed, position), so the text
is that of plain decoding whatever was proposed (DESIGN.md, Noise); trees only change how many tokens a step commits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.plan import Plan
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import MAX_NODES, ROOT, TokenTree, merge


@dataclass(frozen=True, slots=True)
class SpeculationLimits:
    """Bounds of what is proposed and verified: levels and nodes of one tree, children of one node, and rows of all
    trees in a step."""

    max_depth: int = 8
    max_nodes: int = 16
    width: int = 3
    max_rows: int = 64


@dataclass(slots=True)
class SpeculationStats:
    """Counts since the start. `tested` and `accepted` by (number of the proposer, depth): nodes whose parent became
    a token, and those that became one themselves. A node of several proposers counts for each."""

    num_drafted: int = 0
    num_accepted: int = 0
    tested: dict[tuple[int, int], int] = field(default_factory=dict)
    accepted: dict[tuple[int, int], int] = field(default_factory=dict)


class Speculator:
    """Gives decoding sequences of a plan their trees. Without proposers it leaves plans as they are."""

    def __init__(self, proposers: Seq[Proposer] = (), limits: SpeculationLimits | None = None) -> None:
        self.proposers = list(proposers)
        self.limits = limits or SpeculationLimits()
        self.stats = SpeculationStats()

    def extend(self, plan: Plan, scheduler: Scheduler) -> None:
        """Hang trees below the decoding runs of `plan`, in the rows and slots that nobody else needs."""
        budget = min(self.limits.max_rows, scheduler.budget.max_batch_tokens - plan.num_rows)
        wanted = self._wanted(plan, budget)
        if not wanted:
            return
        proposals = [proposer.propose(wanted) for proposer in self.proposers]
        for i, want in enumerate(wanted):
            trees = [self._tree(number, suggested[i], want) for number, suggested in enumerate(proposals)]
            tree = self._choose(merge(trees), min(want.max_nodes, budget))
            room = _reserve(scheduler, want.seq, len(tree))
            if room < len(tree):
                tree = self._choose(tree, room)
            if len(tree):
                plan.trees[want.seq] = tree
                plan.num_rows += len(tree)
                budget -= len(tree)

    def _wanted(self, plan: Plan, budget: int) -> list[Wanted]:
        limits = self.limits
        if not self.proposers or budget <= 0:
            return []
        wanted = []
        for seq, start, end in plan.runs:
            depth = min(limits.max_depth, seq.max_length - end - 1)
            if end - start == 1 and end == len(seq.tokens) and seq.num_output and depth > 0:
                wanted.append(Wanted(seq, depth, min(limits.max_nodes, MAX_NODES), limits.width))
        return wanted

    def _tree(self, number: int, proposal: Proposal, want: Wanted) -> TokenTree:
        """What proposer `number` suggests, without what lies too deep or behind the end of the text."""
        tree = TokenTree()
        stops = want.seq.stop_ids
        kept = {ROOT: (ROOT, 0)}
        columns = zip(proposal.tokens, proposal.parents, proposal.ranks, proposal.confidences, strict=True)
        for node, (token, parent, rank, confidence) in enumerate(columns):
            found = kept.get(parent)
            if found is None or found[1] >= want.max_depth:
                continue
            if token not in stops:
                kept[node] = (len(tree), found[1] + 1)
            tree.tokens.append(token)
            tree.parents.append(found[0])
            tree.chances.append(min(max(confidence, 0.0), 1.0))
            tree.features.append(((number, rank, confidence),))
        return tree

    def _choose(self, tree: TokenTree, most: int) -> TokenTree:
        """The `most` likeliest nodes: a child is never likelier than its parent, so they hang together."""
        if len(tree) <= most:
            return tree
        reaches = tree.reaches()
        best = sorted(range(len(tree)), key=lambda node: (-reaches[node], node))[: max(most, 0)]
        return tree.keep(sorted(best))

    def observe(self, plan: Plan, accepted: dict[Sequence, list[int]]) -> None:
        """Learn from a step: `accepted` are the nodes of each tree that became tokens."""
        stats = self.stats
        for seq, tree in plan.trees.items():
            nodes = accepted.get(seq, [])
            taken = {ROOT, *nodes}
            # Where the text ended, nobody knows what would have followed.
            last = nodes[-1] if nodes else ROOT
            ended = seq.finish_reason is not None
            stats.num_drafted += len(tree)
            stats.num_accepted += len(nodes)
            depths = tree.depths()
            for node, parent in enumerate(tree.parents):
                if parent not in taken or (ended and parent == last):
                    continue
                for number, _, _ in tree.features[node]:
                    key = (number, depths[node])
                    stats.tested[key] = stats.tested.get(key, 0) + 1
                    if node in taken:
                        stats.accepted[key] = stats.accepted.get(key, 0) + 1

    def forget(self, seq: Sequence) -> None:
        """`seq` has stopped running."""
        for proposer in self.proposers:
            proposer.forget(seq)

    def close(self) -> None:
        """Release what the proposers hold."""
        for proposer in self.proposers:
            proposer.close()


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
