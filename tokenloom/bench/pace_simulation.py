"""AdaServe's workload on the engine with a simulated target and draft, in virtual time.

Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative Decoding" (EuroSys 2026):
three classes of requests share a machine, each with its own time per output token; a draft proposes trees, one budget
of verified rows is shared. Only the machine, the texts and what the draft says of them are made up: scheduling, needs,
budgets, selection and learning are those of the engine that serves.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import PAGE_SIZE, TokenBatch
from tokenloom.engine.engine import Engine, EngineLimits
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.policies.chunked_prefill import ChunkedPrefill
from tokenloom.engine.policies.tree_selection import FULL, SelectionPolicy
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Request, Slo
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.speculator import SpeculationLimits, Speculator
from tokenloom.runtime.simulated import CostModel, SimulatedExecutor

TARGET: Final = CostModel(memory_bound=0.026, per_row=0.0002, per_key=1e-8, fixed=0.002)
DRAFT: Final = CostModel(memory_bound=0.0007, per_row=0.000005, per_key=0.0, fixed=0.0003)
WIDTH: Final = 3
MAX_DEPTH: Final = 8
MAX_ROWS: Final = 1024
LONGEST_PROMPT: Final = 8000


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
    """A target and a draft: seconds of a step and of one level of drafting. `max_rows` is the budget of a step, `chunk`
    what it computes of one prompt."""

    target: CostModel = TARGET
    draft: CostModel = DRAFT
    max_running: int = 256
    max_rows: int = MAX_ROWS
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


@dataclass(frozen=True, slots=True)
class ScriptedRequest:
    """A request, and what the draft and the target will say at every position of its output.

    `chances` [output, WIDTH]: the true probability of the draft's choices there, best first; `confidences` what the
    draft says of them; `outcome` [output]: the rank of the target's token, WIDTH where the draft misses it.
    """

    kind: Class
    arrival: float
    num_prompt: int
    chances: NDArray[np.float64]
    confidences: NDArray[np.float64]
    outcome: NDArray[np.int64]


def workload(
    kinds: Seq[Class],
    arrivals: Seq[float],
    seed: int,
    num_output: int = 256,
    spread: float = 0.0,
    honest: bool = False,
) -> list[ScriptedRequest]:
    """One request per arrival time; the same seed gives the same requests at any rate.

    `spread` is the standard deviation of the predictability of the requests of a class. An `honest` draft says the true
    chances; others are over-confident, and only roughly right.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in kinds])
    requests = []
    for arrival in arrivals:
        kind = kinds[rng.choice(len(kinds), p=shares)]
        prompt = int(np.clip(rng.lognormal(np.log(kind.prompt[0]), kind.prompt[1]), 1, LONGEST_PROMPT))
        mean = float(np.clip(rng.normal(kind.predictable, spread), 0.3, 0.95))
        first = rng.beta(2 * mean, 2 * (1 - mean), num_output)
        second = (1 - first) * rng.uniform(0.2, 0.8, num_output)
        third = (1 - first - second) * rng.uniform(0.1, 0.6, num_output)
        chances = -np.sort(-np.stack([first, second, third], 1), axis=1)
        outcome = (rng.random(num_output)[:, None] >= np.cumsum(chances, 1)).sum(1)
        odds = np.log(np.clip(chances, 1e-6, 1 - 1e-6) / np.clip(1 - chances, 1e-6, 1))
        said = 1 / (1 + np.exp(-(1.5 * odds + 0.4 + rng.normal(0, 0.5, odds.shape))))
        confidences = chances if honest else -np.sort(-said, 1)
        requests.append(ScriptedRequest(kind, float(arrival), prompt, chances, confidences, outcome))
    return requests


class ScriptedDraft:
    """A proposer that finds what a beam search over the scripted confidences would; a token is named by its rank.

    Each level of drafting moves the clock by what it costs. `levels` counts levels times requests.
    """

    name = "scripted"

    def __init__(self, requests: Seq[ScriptedRequest], cost: CostModel, clock: VirtualClock) -> None:
        self._said = {str(i): request.confidences.tolist() for i, request in enumerate(requests)}
        self._cost = cost
        self._clock = clock
        self.levels = 0

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        """Levels of one call are drafted for all at once; the first from the roots, the others from `width` nodes."""
        for level in range(max(want.max_depth for want in wanted)):
            deep = [want for want in wanted if want.max_depth > level]
            rows = sum(want.width for want in deep) if level else len(deep)
            self._clock.advance(self._cost.seconds(rows, 0))
            self.levels += len(deep)
        return [self._beam(want) for want in wanted]

    def _beam(self, want: Wanted) -> Proposal:
        proposal = Proposal()
        said = self._said[want.seq.request.request_id]
        width = min(want.width, WIDTH)
        frontier = [(1.0, -1)]
        for position in range(want.seq.num_output, want.seq.num_output + want.max_depth):
            here = said[position][:width]
            found = [
                (reach * confidence, parent, rank)
                for reach, parent in frontier
                for rank, confidence in enumerate(here)
            ]
            frontier = []
            for reach, parent, rank in sorted(found, reverse=True)[:width]:
                if len(proposal.tokens) == want.max_nodes:
                    return proposal
                frontier.append((reach, len(proposal.tokens)))
                proposal.tokens.append(rank)
                proposal.parents.append(parent)
                proposal.ranks.append(rank)
                proposal.confidences.append(here[rank])
        return proposal

    def forget(self, seq: Sequence) -> None:
        """Nothing is held for a sequence."""

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, slots=True)
class System:
    """What serves: speculation within `limits` (None: plain decoding)."""

    name: str
    limits: SpeculationLimits | None


PLAIN: Final = System("plain", None)


def chains(length: int) -> System:
    """Fixed-length speculation: `length` tokens in a row for everybody in every step."""
    return System(
        f"fixed {length}",
        SpeculationLimits(max_depth=length, max_nodes=length, width=1, max_rows=MAX_ROWS, pace="fixed"),
    )


def trees(name: str, selection: SelectionPolicy = FULL) -> System:
    """Trees at the adaptive pace, under `selection`."""
    limits = SpeculationLimits(
        max_depth=MAX_DEPTH, max_nodes=MAX_DEPTH * WIDTH, width=WIDTH, max_rows=MAX_ROWS, selection=selection
    )
    return System(name, limits)


@dataclass(frozen=True, slots=True)
class Report:
    """What came of serving a workload. Rates are per second of the time from the first arrival to the last token;
    `tpot` and `tpot_over_slo` are of each request: seconds per token after the first, and over its SLO. Depth and
    tokens of a step are means over decoding requests, `mean_running` counts those."""

    attainment: float
    attainment_by_class: dict[str, float]
    goodput: float
    throughput: float
    tokens_per_step: float
    mean_depth: float
    mean_running: float
    tpot: list[float]
    tpot_over_slo: list[float]


def serve(system: System, machine: Machine, requests: Seq[ScriptedRequest]) -> Report:
    """Serve all `requests` (at least one, of outputs of one length), and report."""
    clock = VirtualClock()
    engine = _engine(machine, requests, clock)
    draft = ScriptedDraft(requests, machine.draft, clock)
    if system.limits is not None:
        engine.speculate(Speculator([draft], system.limits, clock))
    records: list[StepRecord] = []
    engine.on_step = records.append
    num_output = len(requests[0].outcome)
    upcoming = sorted(range(len(requests)), key=lambda i: -requests[i].arrival)
    tpot = [0.0] * len(requests)
    while upcoming or engine.has_work:
        if not engine.has_work:
            clock.advance(max(0.0, requests[upcoming[-1]].arrival - clock.now()))
        while upcoming and requests[upcoming[-1]].arrival <= clock.now():
            engine.add_request(_request(upcoming[-1], requests[upcoming[-1]]))
            upcoming.pop()
        for delta in engine.step():
            if delta.timings is not None:
                seconds = delta.timings.finished - delta.timings.first_token
                tpot[int(delta.request_id)] = seconds / (num_output - 1)
    span = clock.now() - min(request.arrival for request in requests)
    return _report(requests, tpot, span, records, draft.levels)


def _engine(machine: Machine, requests: Seq[ScriptedRequest], clock: VirtualClock) -> Engine:
    """An engine whose target says what the scripts say."""
    outcomes = np.stack([request.outcome for request in requests])
    prompts = np.array([request.num_prompt for request in requests])

    def choose(batch: TokenBatch) -> NDArray[np.int64]:
        rows = batch.logit_rows
        scripts = rows.seeds.astype(np.int64)
        # A row sees the token at its position whatever path led there: what a wrong one says is not looked at.
        positions = np.minimum(rows.positions - prompts[scripts], outcomes.shape[1] - 1)
        said: NDArray[np.int64] = outcomes[scripts, positions]
        return said

    longest = int(prompts.max()) + outcomes.shape[1]
    pages = (prompts + outcomes.shape[1]) // PAGE_SIZE + 1 + MAX_DEPTH * WIDTH // PAGE_SIZE + 1
    return Engine(
        SimulatedExecutor(clock, machine.target, WIDTH + 1, choose),
        EngineLimits(
            vocab_size=WIDTH + 1,
            max_context=longest,
            num_pages=int(pages.sum()),
            max_running=machine.max_running,
            max_waiting=len(requests),
            prefix_cache=False,
        ),
        budget=ChunkedPrefill(machine.max_rows, machine.chunk),
        clock=clock,
    )


def _request(number: int, script: ScriptedRequest) -> Request:
    """The request of script `number`, which is its id and its seed."""
    return Request(
        request_id=str(number),
        prompt_token_ids=[0] * script.num_prompt,
        params=SamplingParams(max_tokens=len(script.outcome), ignore_eos=True, seed=number),
        slo=Slo(tpot=script.kind.tpot),
        arrival=script.arrival,
    )


def _report(
    requests: Seq[ScriptedRequest], tpot: list[float], span: float, records: list[StepRecord], levels: int
) -> Report:
    kept = [seconds <= request.kind.tpot for seconds, request in zip(tpot, requests, strict=True)]
    by_class: dict[str, list[bool]] = {}
    for request, is_kept in zip(requests, kept, strict=True):
        by_class.setdefault(request.kind.name, []).append(is_kept)
    running = sum(record.decode_rows for record in records)
    accepted = sum(record.num_accepted for record in records)
    steps = sum(record.decode_rows > 0 for record in records)
    num_output = len(requests[0].outcome)
    return Report(
        float(np.mean(kept)),
        {name: float(np.mean(found)) for name, found in sorted(by_class.items())},
        num_output * sum(kept) / span,
        num_output * len(requests) / span,
        (running + accepted) / running,
        levels / running,
        running / steps,
        tpot,
        [seconds / request.kind.tpot for seconds, request in zip(tpot, requests, strict=True)],
    )
