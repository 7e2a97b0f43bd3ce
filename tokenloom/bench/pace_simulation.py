"""AdaServe's workload in a discrete-event simulation of the policies of speculation.

Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative Decoding" (EuroSys 2026):
three classes of requests share a machine, each with its own time per output token; a draft proposes trees, one budget
of verified rows is shared. Only the machine and the acceptance are made up: needs, budgets and selection are the
functions that serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.policies.acceptance import AcceptanceTable
from tokenloom.engine.policies.pace import Pace, TimePrice, needs_of
from tokenloom.engine.policies.tree_budget import Load, TreeBudget
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.token_tree import TokenTree
from tokenloom.runtime.simulated import CostModel

TARGET: Final = CostModel(memory_bound=0.026, per_row=0.0002, per_key=1e-8, fixed=0.002)
DRAFT: Final = CostModel(memory_bound=0.0007, per_row=0.000005, per_key=0.0, fixed=0.0003)
WIDTH: Final = 3
MAX_DEPTH: Final = 8
MAX_ROWS: Final = 1024
FASTEST: Final = 3.0
"""Tokens a step that a request may hope for at best, when the question is whether its SLO can still be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """A kind of requests: its share of all, its SLO in seconds per token, its prompts (median tokens, sigma of the
    log), and how predictable its text is (mean probability of the draft's first choice)."""

    name: str
    share: float
    tpot: float
    prompt: tuple[float, float]
    predictable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A target and a draft: seconds of a step and of one level of drafting."""

    target: CostModel = TARGET
    draft: CostModel = DRAFT
    max_running: int = 256
    chunk: int = 512

    @property
    def baseline(self) -> float:
        """Seconds of a decode step of one request."""
        return self.target.seconds(1, 1000)


def classes(baseline: float) -> tuple[Class, ...]:
    """The paper's three: code completion at 1.2 times the baseline, chat at 50 ms, summaries at 150 ms."""
    return (
        Class(name="code", share=0.6, tpot=1.2 * baseline, prompt=(150, 0.4), predictable=0.80),
        Class(name="chat", share=0.2, tpot=0.050, prompt=(100, 0.7), predictable=0.70),
        Class(name="summary", share=0.2, tpot=0.150, prompt=(900, 0.4), predictable=0.75),
    )


@dataclass(slots=True)
class SimulatedRequest:
    """A request, and what the draft and the target would say at every position of its output.

    `chances` [output, WIDTH]: the true probability of the draft's choices there, best first; `confidences` what the
    draft says of them; `outcome` [output]: the rank of the target's token, WIDTH where the draft misses it.
    """

    kind: Class
    arrival: float
    num_prompt: int
    chances: NDArray[np.float64]
    confidences: NDArray[np.float64]
    outcome: list[int]
    pace: Pace
    prefilled: int = 0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first."""
        return (self.finished - self.first_token) / (len(self.outcome) - 1)

    @property
    def attained(self) -> bool:
        """Whether that was within the SLO."""
        return self.tpot <= self.kind.tpot


def workload(
    kinds: Sequence[Class],
    arrivals: Sequence[float],
    seed: int,
    num_output: int = 256,
    spread: float = 0.0,
) -> list[SimulatedRequest]:
    """One request per arrival time; the same seed gives the same requests at any rate.

    `spread` is the standard deviation of the predictability of the requests of a class.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in kinds])
    requests = []
    for arrival in arrivals:
        kind = kinds[rng.choice(len(kinds), p=shares)]
        prompt = int(np.clip(rng.lognormal(np.log(kind.prompt[0]), kind.prompt[1]), 1, 8000))
        mean = float(np.clip(rng.normal(kind.predictable, spread), 0.3, 0.95))
        first = rng.beta(2 * mean, 2 * (1 - mean), num_output)
        second = (1 - first) * rng.uniform(0.2, 0.8, num_output)
        third = (1 - first - second) * rng.uniform(0.1, 0.6, num_output)
        chances = -np.sort(-np.stack([first, second, third], 1), axis=1)
        outcome = (rng.random(num_output)[:, None] >= np.cumsum(chances, 1)).sum(1)
        # A draft is over-confident, and only roughly right.
        odds = np.log(np.clip(chances, 1e-6, 1 - 1e-6) / np.clip(1 - chances, 1e-6, 1))
        said = 1 / (1 + np.exp(-(1.5 * odds + 0.4 + rng.normal(0, 0.5, odds.shape))))
        requests.append(
            SimulatedRequest(
                kind, float(arrival), prompt, chances, -np.sort(-said, 1), outcome.tolist(), Pace(kind.tpot)
            )
        )
    return requests


@dataclass(frozen=True, slots=True)
class System:
    """What serves: `chain` >= 0 is fixed-length speculation (0: none), else trees under `selection`.

    `exact` gives the policies the true chances; otherwise they learn them from the draft's confidences. Without
    `priced` a step is judged by its own rate, and not by what time is worth.
    """

    name: str
    chain: int = -1
    selection: SelectionPolicy = FULL
    exact: bool = False
    priced: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """What came of serving a workload. Rates are per second of the time from the first arrival to the last token."""

    attainment: float
    attainment_by_class: dict[str, float]
    goodput: float
    throughput: float
    tokens_per_step: float
    mean_depth: float
    mean_running: float
    tpot_over_slo: list[float]


class Simulation:
    """One system on one machine, step by step."""

    def __init__(self, system: System, machine: Machine) -> None:
        self.system = system
        self.machine = machine
        self.now = 0.0
        self.running: list[SimulatedRequest] = []
        self.table = AcceptanceTable()
        self.budget = TreeBudget(system.selection)
        self.shapes: list[tuple[int, int, int]] = []

    def serve(self, requests: Sequence[SimulatedRequest]) -> Report:
        """Serve them all, in the order of their arrival."""
        waiting = sorted(requests, key=lambda request: request.arrival)[::-1]
        while waiting or self.running:
            if not self.running:
                self.now = max(self.now, waiting[-1].arrival)
            while (
                waiting and waiting[-1].arrival <= self.now and len(self.running) < self.machine.max_running
            ):
                self.running.append(waiting.pop())
            self._step()
        return self._report(requests)

    def _step(self) -> None:
        decoding = [request for request in self.running if request.prefilled >= request.num_prompt]
        left = self.machine.chunk
        chunks: list[tuple[SimulatedRequest, int]] = []
        for request in self.running:
            rows = min(left, request.num_prompt - request.prefilled)
            if rows > 0:
                chunks.append((request, rows))
                left -= rows
        keys = sum(request.num_prompt + request.pace.produced for request in decoding)
        keys += sum(request.prefilled + rows for request, rows in chunks)
        load = Load(len(decoding), sum(rows for _, rows in chunks), keys)
        serve = self._chains if self.system.chain >= 0 else self._trees
        taken = serve(decoding, load)
        for request, count in zip(decoding, taken, strict=True):
            request.pace.produced = min(request.pace.produced + count, len(request.outcome) - 1)
            if request.pace.produced == len(request.outcome) - 1:
                request.finished = self.now
                self.running.remove(request)
        for request, rows in chunks:
            request.prefilled += rows
            if request.prefilled >= request.num_prompt:
                request.first_token = self.now
                request.pace.begin(self.now)

    def _chains(self, decoding: list[SimulatedRequest], load: Load) -> list[int]:
        """A step of fixed-length speculation: tokens of each request."""
        depth, machine = self.system.chain, self.machine
        taken = []
        for request in decoding:
            start = request.pace.produced + 1
            hits = 0
            for rank in request.outcome[start : start + depth]:
                if rank:
                    break
                hits += 1
            taken.append(1 + hits)
        self.now += machine.target.seconds(load.requests * (1 + depth) + load.other_rows, load.keys)
        if decoding:
            self.now += depth * machine.draft.seconds(load.requests, 0)
            self.shapes.append((load.requests, depth, sum(taken)))
        return taken

    def _trees(self, decoding: list[SimulatedRequest], load: Load) -> list[int]:
        """A step under the policies: tokens of each request."""
        budget, machine = self.budget, self.machine
        level = machine.draft.seconds(load.requests * WIDTH, 0)
        depth = budget.depth(load, level, MAX_DEPTH)
        trees = [self._beam(request, depth) for request in decoding]
        fastest = budget.curve.seconds(load.requests + load.other_rows, load.keys) / FASTEST
        needs = needs_of(
            [request.pace for request in decoding],
            self.now,
            depth,
            [len(request.outcome) - 1 - request.pace.produced for request in decoding],
            fastest,
        )
        choice = budget.choose(
            RankedTrees(trees), load, needs, limit=MAX_ROWS - load.other_rows, drafting=depth * level
        )
        taken = [self._walk(*each) for each in zip(decoding, trees, choice.nodes, strict=True)]
        seconds = machine.target.seconds(choice.rows + load.other_rows, load.keys)
        budget.observe(trees, choice, taken, load, seconds=seconds, depth=depth, drafting=depth * level)
        if not self.system.priced:
            budget.price = TimePrice()
        self.now += seconds + depth * level
        if decoding:
            self.shapes.append((load.requests, depth, sum(taken)))
        return taken

    def _beam(self, request: SimulatedRequest, depth: int) -> TokenTree:
        """What a beam search of the draft finds; a token is named by its rank."""
        start = request.pace.produced + 1
        tree = TokenTree()
        frontier = [(1.0, -1)]
        for position in range(start, min(start + depth, len(request.outcome))):
            said = request.confidences[position].tolist()
            chances = (
                request.chances[position].tolist()
                if self.system.exact
                else self.table.chances(0, request.kind.name, range(WIDTH), said)
            )
            found = [
                (reach * said[rank], parent, rank) for reach, parent in frontier for rank in range(WIDTH)
            ]
            frontier = []
            for reach, parent, rank in sorted(found, reverse=True)[:WIDTH]:
                frontier.append((reach, len(tree)))
                tree.tokens.append(rank)
                tree.parents.append(parent)
                tree.reaches.append(chances[rank] * (1.0 if parent < 0 else tree.reaches[parent]))
                tree.features.append(((0, rank, said[rank]),))
        return tree

    def _walk(self, request: SimulatedRequest, tree: TokenTree, nodes: list[int]) -> int:
        """Tokens of the step; what was verified below a taken path is learned."""
        children: dict[int, list[int]] = {}
        for node in nodes:
            children.setdefault(tree.parents[node], []).append(node)
        taken, at = 1, -1
        while at in children and request.pace.produced + taken < len(request.outcome):
            wanted = request.outcome[request.pace.produced + taken]
            after = -2
            for node in children[at]:
                hit = tree.tokens[node] == wanted
                _, rank, confidence = tree.features[node][0]
                self.table.observe(0, request.kind.name, rank, confidence, hit)
                after = node if hit else after
            if after == -2:
                break
            taken, at = taken + 1, after
        return taken

    def _report(self, requests: Sequence[SimulatedRequest]) -> Report:
        span = max(request.finished for request in requests) - min(request.arrival for request in requests)
        by_class: dict[str, list[bool]] = {}
        for request in requests:
            by_class.setdefault(request.kind.name, []).append(request.attained)
        shapes = np.array(self.shapes, float)
        running, depths, made = shapes.T
        tokens = sum(len(request.outcome) for request in requests)
        return Report(
            float(np.mean([request.attained for request in requests])),
            {name: float(np.mean(found)) for name, found in sorted(by_class.items())},
            sum(len(request.outcome) for request in requests if request.attained) / span,
            tokens / span,
            float(made.sum() / running.sum()),
            float(np.average(depths, weights=running)),
            float(running.mean()),
            [request.tpot / request.kind.tpot for request in requests],
        )
