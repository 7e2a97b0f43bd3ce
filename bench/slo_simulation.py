"""Paces per request in simulation: AdaServe's workload under the policies of speculation and under fixed lengths.

    python bench/slo_simulation.py [--quick] [--json] [--trace FILE] [--seeds 1,2,3] [--out FILE]

Three classes of requests (60 % code completion at 1.2 times the baseline, 20 % chat at 50 ms, 20 % summaries at
150 ms per token, 256 tokens each) arrive at the times of a trace, scaled to a rate, or of a seeded bursty process where
`--trace` names none. First the load is searched at which the best fixed length of 1 to 8 attains 75 % of the SLOs;
there the systems are compared: plain decoding, that fixed length, an even split of the budget, a first phase for the
needs with the rest split evenly, both phases, both in descending order, needs served whatever they cost as in the
paper, and no first phase. Everything random has a seed; the same command prints the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tokenloom.bench.load.arrivals import arrival_times
from tokenloom.bench.load.traces import READERS, detect_format
from tokenloom.bench.pace_simulation import DRAFT, Machine, Report, Simulation, System, classes, workload
from tokenloom.engine.policies.tree_selection import RankedTrees, SelectionPolicy
from tokenloom.engine.token_tree import TokenTree
from tokenloom.errors import InvalidParameter

FIXED = [System(f"fixed {length}", chain=length) for length in range(1, 9)]
TREES = [
    System("equal split", selection=SelectionPolicy(serve_needs=False, rest="equal")),
    System("+ SLO selection", selection=SelectionPolicy(boost=2.0, rest="equal")),
    System("+ throughput selection", selection=SelectionPolicy(boost=2.0)),
]
FULL = TREES[-1]
OTHERS = [
    System("descending", selection=SelectionPolicy(boost=2.0, order="descending")),
    System("needs at any price", selection=SelectionPolicy()),
    System("needs at any price, descending", selection=SelectionPolicy(order="descending")),
    System("no SLO phase", selection=SelectionPolicy(serve_needs=False)),
    System("each step by its own rate", selection=SelectionPolicy(boost=2.0), priced=False),
    System("known chances", selection=SelectionPolicy(boost=2.0), exact=True),
]
TARGET_ATTAINMENT = 0.75
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


def serve(
    system: System,
    machine: Machine,
    arrivals: Arrivals,
    rate: float,
    seeds: Sequence[int],
    spread: float = SPREAD,
) -> Average:
    kinds = classes(machine.baseline)
    return average(
        system.name,
        [
            Simulation(system, machine).serve(workload(kinds, arrivals.at(rate, seed), seed, spread=spread))
            for seed in seeds
        ],
    )


def find_load(best: Callable[[float], Average], low: float, high: float) -> float:
    """The rate at which `best` attains `TARGET_ATTAINMENT`, by bisection to 2 %."""
    while best(high).attainment > TARGET_ATTAINMENT:
        low, high = high, 2 * high
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if best(middle).attainment > TARGET_ATTAINMENT:
            low = middle
        else:
            high = middle
    return low


def measure(
    machine: Machine, arrivals: Arrivals, seeds: Sequence[int], others: bool, spread: float = SPREAD
) -> dict[str, Any]:
    """The comparison at the load where the best fixed length attains about `TARGET_ATTAINMENT`."""

    def best_fixed(rate: float) -> Average:
        return max(
            (serve(system, machine, arrivals, rate, seeds, spread) for system in FIXED),
            key=lambda found: (found.attainment, found.goodput),
        )

    rate = find_load(best_fixed, 1.0, 4.0)
    fixed = best_fixed(rate)
    systems = [System("plain", chain=0), *TREES, *(OTHERS if others else [])]
    rows = [serve(system, machine, arrivals, rate, seeds, spread) for system in systems]
    rows.insert(1, fixed)
    full = next(row for row in rows if row.name == FULL.name)
    ablation = [row.attainment for row in rows[2:5]]
    return {
        "rate": round(rate, 3),
        "best_fixed": fixed.name,
        "best_fixed_attainment": round(fixed.attainment, 4),
        "attainment": round(full.attainment, 4),
        "slo_violation_ratio": round((1 - fixed.attainment) / max(1 - full.attainment, 1e-9), 3),
        "goodput_ratio": round(full.goodput / fixed.goodput, 3),
        "ablation_monotone": ablation == sorted(ablation),
        "systems": {
            row.name: {
                "attainment": round(row.attainment, 4),
                "goodput": round(row.goodput, 1),
                "throughput": round(row.throughput, 1),
                "tokens_per_step": round(row.tokens_per_step, 3),
                "depth": round(row.mean_depth, 2),
                "running": round(row.mean_running, 1),
                **{kind: round(value, 4) for kind, value in row.by_class.items()},
            }
            for row in rows
        },
    }


def by_load(machine: Machine, arrivals: Arrivals, seeds: Sequence[int], rate: float) -> dict[str, Any]:
    """Attainment and depth of the full system around `rate`: depth falls as the load rises."""
    found = {}
    for factor in (0.25, 0.5, 0.8, 1.0, 1.1, 1.25):
        row = serve(FULL, machine, arrivals, rate * factor, seeds[:1])
        fixed = max(
            (serve(system, machine, arrivals, rate * factor, seeds[:1]) for system in FIXED[:4]),
            key=lambda each: (each.attainment, each.goodput),
        )
        found[f"{factor:g}"] = {
            "attainment": round(row.attainment, 4),
            "best_fixed_attainment": round(fixed.attainment, 4),
            "best_fixed": fixed.name,
            "tokens_per_step": round(row.tokens_per_step, 3),
            "depth": round(row.mean_depth, 2),
            "running": round(row.mean_running, 1),
        }
    return found


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
        RankedTrees(trees).select(3 * requests, needs, FULL.selection)
        times.append(perf_counter() - started)
    return round(1e3 * min(times), 3)


def read_trace(path: Path) -> tuple[float, ...]:
    """Start times of a trace in seconds, ascending."""
    return tuple(sorted(session.start for session in READERS[detect_format(path)](path)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, one seed, the main systems")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--trace", type=Path, help="arrival times: a trace that `bench serve` reads")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated (default: 1,2,3)")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be whole numbers with commas between them, not {args.seeds!r}")
    if any(seed < 0 for seed in seeds):
        parser.error("--seeds must be at least 0")
    count = 150 if args.quick else 400
    try:
        trace = read_trace(args.trace) if args.trace else ()
    except InvalidParameter as error:
        parser.error(str(error))
    if args.trace and len(trace) <= count:
        parser.error(f"--trace has {len(trace)} requests; more than {count} are needed")
    arrivals, machine = Arrivals(trace, count), Machine()
    seeds = seeds[:1] if args.quick else seeds
    results = measure(machine, arrivals, seeds, others=not args.quick)
    results["selection_ms_256"] = selection_ms()
    if not args.quick:
        results["by_load"] = by_load(machine, arrivals, seeds, results["rate"])
        # The draft of the paper costs a sixth of a target step per level, in place of a twenty-eighth.
        dear = replace(machine, draft=replace(DRAFT, memory_bound=0.0045))
        results["dear_draft"] = measure(dear, arrivals, seeds, others=False)
        results["even_texts"] = measure(machine, arrivals, seeds, others=False, spread=0.0)
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
