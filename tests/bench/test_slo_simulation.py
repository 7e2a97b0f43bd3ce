"""AdaServe's workload in simulation: paces, the ablation, overload, best effort, and the script."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tokenloom.bench.load.arrivals import arrival_times
from tokenloom.bench.pace_simulation import Machine, Report, Simulation, System, classes, workload
from tokenloom.engine.policies.tree_selection import SelectionPolicy

MACHINE = Machine()
KINDS = classes(MACHINE.baseline)
EQUAL = SelectionPolicy(serve_needs=False, rest="equal")
OVERLOAD = 8.0


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    times = arrival_times(rate, 0.5, seed)
    return [next(times) for _ in range(count)]


@cache
def serve(system: System, rate: float, count: int = 150, seed: int = 1) -> Report:
    return Simulation(system, MACHINE).serve(workload(KINDS, arrivals(rate, count, seed), seed))


@pytest.mark.parametrize("exact", [True, False])
def test_every_request_that_can_keep_its_pace_does(exact: bool) -> None:
    """At a load where all SLOs are feasible: within 2 % of the SLO, each of them, with known and learned chances."""
    report = serve(System("full", exact=exact), 4.0)
    assert max(report.tpot_over_slo) <= 1.02
    assert serve(System("plain", chain=0), 4.0).attainment < 0.9, "plain decoding must not suffice"


def test_under_overload_it_beats_every_fixed_length_and_an_even_split() -> None:
    full = serve(System("full"), OVERLOAD)
    fixed = [serve(System(f"fixed {k}", chain=k), OVERLOAD) for k in range(9)]
    assert max(report.attainment for report in fixed) < 0.95, "there must be an overload"
    assert full.attainment > max(report.attainment for report in fixed)
    assert full.goodput > max(report.goodput for report in fixed)
    assert full.attainment >= serve(System("equal", selection=EQUAL), OVERLOAD).attainment


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_both_orders_degrade_no_worse_than_an_even_split(order: str) -> None:
    policy = SelectionPolicy(order=order, boost=2.0)  # type: ignore[arg-type]
    report = serve(System(order, selection=policy), OVERLOAD)
    assert report.attainment >= serve(System("equal", selection=EQUAL), OVERLOAD).attainment


def test_best_effort_requests_never_starve() -> None:
    """Without an SLO beside requests that are hopelessly behind: at least a token in each step."""
    kinds = (
        replace(KINDS[0], share=0.7, tpot=0.001),
        replace(KINDS[1], share=0.3, tpot=float("inf")),
    )
    simulation = Simulation(System("full"), MACHINE)
    requests = workload(kinds, [0.0] * 30, seed=3, num_output=64)
    simulation.serve(requests)
    free = [request for request in requests if request.kind.tpot == float("inf")]
    assert free and all(request.finished > 0 for request in free)
    longest = MACHINE.target.seconds(30 * 65 + MACHINE.chunk, 30 * 8000) + 8 * MACHINE.draft.seconds(90, 0)
    assert max(request.tpot for request in free) <= longest


def test_speculation_shrinks_as_the_load_rises() -> None:
    reports = [serve(System("full"), rate) for rate in (0.5, 4.0, OVERLOAD)]
    assert reports[0].mean_depth > reports[1].mean_depth > reports[2].mean_depth
    assert reports[0].tokens_per_step > reports[1].tokens_per_step > reports[2].tokens_per_step


def test_learned_chances_do_as_well_as_known_ones() -> None:
    """The draft says something far from the truth; what the table makes of it costs at most 2 % of the tokens."""
    learned, known = (serve(System("full", exact=exact), 4.0) for exact in (False, True))
    assert learned.tokens_per_step >= 0.98 * known.tokens_per_step


def test_the_workload_is_what_it_says() -> None:
    requests = workload(KINDS, [0.0] * 2000, seed=0)
    names = [request.kind.name for request in requests]
    assert names.count("code") / 2000 == pytest.approx(0.6, abs=0.04)
    for rank in range(3):
        hits = np.mean([np.equal(request.outcome, rank).mean() for request in requests])
        said = np.mean([request.chances[:, rank].mean() for request in requests])
        assert hits == pytest.approx(said, abs=0.01)
    again = workload(KINDS, [0.0] * 2000, seed=0)
    assert all(a.outcome == b.outcome for a, b in zip(requests, again, strict=True))


def test_the_script(repository: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(repository / "bench" / "slo_simulation.py"), *arguments],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=600,
        )

    shown = run("--quick", "--json", "--out", str(tmp_path / "out.json"))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert 0.6 <= found["best_fixed_attainment"] <= 0.9
    assert found["slo_violation_ratio"] > 1
    assert found["goodput_ratio"] > 1
    assert {"plain", "equal split", "+ SLO selection", "+ throughput selection"} <= set(found["systems"])
    short = tmp_path / "trace.csv"
    short.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    for arguments, wanted in {
        ("--seeds", "one"): "--seeds must be whole numbers",
        ("--seeds", "-1"): "--seeds must be at least 0",
        ("--trace", str(tmp_path / "none")): "a file",
        ("--trace", str(short), "--quick"): "--trace has 1 requests",
    }.items():
        refused = run(*arguments)
        assert refused.returncode == 2
        assert wanted in refused.stderr
