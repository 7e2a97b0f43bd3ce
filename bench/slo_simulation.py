"""Paces per request in simulation: AdaServe's workload on the engine, under the policies of speculation.

    python bench/slo_simulation.py [--quick] [--json] [--trace FILE] [--seeds 1,2,3] [--workers 2] [--out FILE]

Three classes of requests (60 % code completion at 1.2 times the baseline, 20 % chat at 50 ms, 20 % summaries at
150 ms per token, 256 tokens each) arrive at the times of a trace, scaled to a rate, or of a seeded bursty process where
`--trace` names none. The engine and its speculator serve them on a simulated machine, in virtual time. First the load
is searched at which the best fixed length of 1 to 8 attains about 75 % of the SLOs; there the systems are compared:
plain decoding, that fixed length, an even split of the budget, a first phase for the needs with the rest split evenly,
both phases, both in descending order, needs served whatever they cost as in the paper, and no first phase. Everything
random has a seed; the same command prints the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tokenloom.bench.load.arrivals import arrival_times
from tokenloom.bench.load.traces import READERS, detect_format
from tokenloom.bench.pace_simulation import (
    DRAFT,
    PLAIN,
    Machine,
    Report,
    System,
    chains,
    classes,
    serve,
    trees,
    workload,
)
from tokenloom.engine.policies.tree_selection import FULL, RankedTrees, SelectionPolicy
from tokenloom.engine.token_tree import TokenTree
from tokenloom.errors import InvalidParameter

LENGTHS = range(1, 9)
WHOLE = trees("+ throughput selection")
ABLATION = [
    trees("equal split", SelectionPolicy(serve_needs=False, rest="equal")),
    trees("+ SLO selection", replace(FULL, rest="equal")),
    WHOLE,
]
OTHERS = [
    trees("descending", replace(FULL, order="descending")),
    trees("needs at any price", SelectionPolicy()),
    trees("needs at any price, descending", SelectionPolicy(order="descending")),
    trees("no SLO phase", SelectionPolicy(serve_needs=False)),
]
COUNT, SEEDS = 400, (1, 2, 3)
QUICK_COUNT, QUICK_SEEDS = 100, (1, 2)
TARGET_ATTAINMENT = (0.73, 0.77)
FIRST_RATE, MOST_RATE = 7.5, 100.0
SPREAD = 0.12
"""How much the texts of a class differ: standard deviation of their predictability."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Times of requests at any rate: windows of a trace, or a gamma process."""

    trace: tuple[float, ...]
    count: int

    def at(self, rate: float, seed: int) -> list[float]:
        """`count` times from 0 at `rate` per second on average; each seed has a window of its own."""
        if not self.trace:
            return list(islice(arrival_times(rate, 0.5, seed), self.count))
        start = seed * 2503 % (len(self.trace) - self.count)
        window = np.array(self.trace[start : start + self.count]) - self.trace[start]
        return [float(time) for time in window * (self.count / rate / window[-1])]


@dataclass(frozen=True, slots=True)
class Average:
    """Means over the seeds."""

    name: str
    attainment: float
    goodput: float
    throughput: float
    tokens_per_step: float
    mean_depth: float
    mean_running: float
    by_class: dict[str, float]


def average(name: str, reports: Sequence[Report]) -> Average:
    def mean(field: str) -> float:
        return float(np.mean([getattr(report, field) for report in reports]))

    return Average(
        name,
        mean("attainment"),
        mean("goodput"),
        mean("throughput"),
        mean("tokens_per_step"),
        mean("mean_depth"),
        mean("mean_running"),
        {
            kind: float(np.mean([report.attainment_by_class[kind] for report in reports]))
            for kind in reports[0].attainment_by_class
        },
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One workload for one system."""

    system: System
    machine: Machine
    arrivals: Arrivals
    rate: float
    seed: int
    spread: float

    def serve(self) -> Report:
        times = self.arrivals.at(self.rate, self.seed)
        kinds = classes(self.machine.baseline)
        return serve(self.system, self.machine, workload(kinds, times, self.seed, spread=self.spread))


@dataclass
class Study:
    """Systems on one machine; what was served once is remembered. Runs go to `pool`, if there is one."""

    machine: Machine
    arrivals: Arrivals
    seeds: Sequence[int]
    spread: float = SPREAD
    pool: ProcessPoolExecutor | None = None
    found: dict[tuple[str, float], Average] = field(default_factory=dict)

    def serve(self, systems: Sequence[System], rate: float) -> list[Average]:
        """One average for each, in their order."""
        new = [system for system in systems if (system.name, rate) not in self.found]
        runs = [
            Run(system, self.machine, self.arrivals, rate, seed, self.spread)
            for system in new
            for seed in self.seeds
        ]
        reports = list(self.pool.map(Run.serve, runs) if self.pool else map(Run.serve, runs))
        for i, system in enumerate(new):
            part = reports[i * len(self.seeds) : (i + 1) * len(self.seeds)]
            self.found[system.name, rate] = average(system.name, part)
        return [self.found[system.name, rate] for system in systems]

    def best_fixed(self, rate: float, lengths: Sequence[int] = LENGTHS) -> Average:
        """Of fixed `lengths`, the one with the most SLOs attained, and then with the most goodput."""
        found = self.serve([chains(length) for length in lengths], rate)
        return max(found, key=lambda each: (each.attainment, each.goodput))

    def find_load(self) -> float:
        """A rate at which the best fixed length attains within `TARGET_ATTAINMENT`, or the closest one within 2 %.

        On the way only short lengths are looked at, since long ones never win under such a load; `measure` looks at all
        of them.
        """
        # Few requests are no overload however fast they come: then the highest rate has to do.
        least, most = TARGET_ATTAINMENT
        low, high, rate = 0.0, 0.0, FIRST_RATE
        while not (low and high) or high / low > 1.02:
            attained = self.best_fixed(rate, range(1, 4)).attainment
            if least <= attained <= most or rate > MOST_RATE:
                return rate
            if attained > most:
                low = rate
            else:
                high = rate
            rate = (low * high) ** 0.5 if low and high else rate * (1.25 if low else 0.8)
        return low


def measure(study: Study, others: bool) -> dict[str, Any]:
    """The comparison at the load where the best fixed length attains about `TARGET_ATTAINMENT`."""
    rate = study.find_load()
    fixed = study.best_fixed(rate)
    rows = study.serve([PLAIN, *ABLATION, *(OTHERS if others else [])], rate)
    rows.insert(1, fixed)
    whole = next(row for row in rows if row.name == WHOLE.name)
    ablation = [row.attainment for row in rows[2:5]]
    return {
        "rate": round(rate, 3),
        "best_fixed": fixed.name,
        "best_fixed_attainment": round(fixed.attainment, 4),
        "attainment": round(whole.attainment, 4),
        "slo_violation_ratio": round((1 - fixed.attainment) / max(1 - whole.attainment, 1e-9), 3),
        "goodput_ratio": round(whole.goodput / fixed.goodput, 3),
        "ablation_monotone": ablation == sorted(ablation),
        "systems": {row.name: describe(row) for row in rows},
    }


def describe(row: Average) -> dict[str, float]:
    return {
        "attainment": round(row.attainment, 4),
        "goodput": round(row.goodput, 1),
        "throughput": round(row.throughput, 1),
        "tokens_per_step": round(row.tokens_per_step, 3),
        "depth": round(row.mean_depth, 2),
        "running": round(row.mean_running, 1),
        **{kind: round(value, 4) for kind, value in row.by_class.items()},
    }


def by_load(study: Study, rate: float) -> dict[str, Any]:
    """Attainment and depth of the whole system around `rate`: depth falls as the load rises."""
    found = {}
    for factor in (0.25, 0.5, 0.8, 1.0, 1.1, 1.25):
        (row,) = study.serve([WHOLE], rate * factor)
        fixed = study.best_fixed(rate * factor, range(1, 5))
        found[f"{factor:g}"] = {
            **describe(row),
            "best_fixed": fixed.name,
            "best_fixed_attainment": round(fixed.attainment, 4),
        }
    return found


def measure_slo(spec: dict[str, Any]) -> dict[str, Any]:
    """The part `slo` of bench/speculation.py: the comparison at the times of a bursty process, in this process."""
    count, seeds = (QUICK_COUNT, QUICK_SEEDS) if spec["quick"] else (COUNT, SEEDS)
    return measure(Study(Machine(), Arrivals((), count), seeds), others=False)


def selection_ms(requests: int = 256, width: int = 3, depth: int = 8) -> float:
    """Milliseconds to rank and select the trees of a step, the best of 50."""
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(requests):
        tree, level = TokenTree(), [-1]
        for _ in range(depth):
            below = []
            for _ in range(width):
                below.append(len(tree))
                tree.tokens.append(len(tree))
                parent = level[int(rng.integers(len(level)))]
                tree.parents.append(parent)
                tree.reaches.append(float(rng.random()) * (1.0 if parent < 0 else tree.reaches[parent]))
                tree.features.append(())
            level = below
        trees.append(tree)
    needs = rng.uniform(0, 4, requests)
    times = []
    for _ in range(50):
        started = perf_counter()
        RankedTrees(trees).select(3 * requests, needs, FULL)
        times.append(perf_counter() - started)
    return round(1e3 * min(times), 3)


def read_trace(path: Path) -> tuple[float, ...]:
    """Start times of a trace in seconds, ascending."""
    return tuple(sorted(session.start for session in READERS[detect_format(path)](path)))


def study_all(study: Study, quick: bool) -> dict[str, Any]:
    """The comparison and, unless `quick`, how far it depends on the load and on what was made up."""
    results = measure(study, others=not quick)
    results["selection_ms_256"] = selection_ms()
    if not quick:
        results["by_load"] = by_load(replace(study, seeds=study.seeds[:1], found={}), results["rate"])
        # The draft of the paper costs a sixth of a target step per level, in place of a twenty-eighth.
        dear = replace(study.machine, draft=replace(DRAFT, memory_bound=0.0045))
        results["dear_draft"] = measure(replace(study, machine=dear, found={}), others=False)
        results["even_texts"] = measure(replace(study, spread=0.0, found={}), others=False)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, two seeds, the main systems")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--trace", type=Path, help="arrival times: a trace that `bench serve` reads")
    parser.add_argument("--seeds", help="comma-separated (default: 1,2,3, or 1,2 with --quick)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    try:
        given = [int(seed) for seed in args.seeds.split(",")] if args.seeds else None
    except ValueError:
        parser.error(f"--seeds must be whole numbers with commas between them, not {args.seeds!r}")
    if any(seed < 0 for seed in given or ()):
        parser.error("--seeds must be at least 0")
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    count, seeds = (QUICK_COUNT, QUICK_SEEDS) if args.quick else (COUNT, SEEDS)
    try:
        trace = read_trace(args.trace) if args.trace else ()
    except InvalidParameter as error:
        parser.error(str(error))
    if args.trace and len(trace) <= count:
        parser.error(f"--trace has {len(trace)} requests; more than {count} are needed")
    with ProcessPoolExecutor(args.workers) as pool:
        study = Study(Machine(), Arrivals(trace, count), given or seeds, pool=pool)
        results = study_all(study, args.quick)
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, row in value.items():
                print(f"  {key}: {row}")
        else:
            print(f"{name}: {value}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
