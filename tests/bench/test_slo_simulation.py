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
from tokenloom.bench.pace_simulation import (
    PLAIN,
    Machine,
    Report,
    System,
    chains,
    classes,
    trees,
    workload,
)
from tokenloom.bench.pace_simulation import serve as serve_all
from tokenloom.engine.policies.tree_selection import FULL, SelectionPolicy

MACHINE = Machine()
KINDS = classes(MACHINE.baseline)
WHOLE = trees("whole")
EQUAL = trees("equal", SelectionPolicy(serve_needs=False, rest="equal"))
FEASIBLE, OVERLOAD = 4.0, 8.5


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    times = arrival_times(rate, 0.5, seed)
    return [next(times) for _ in range(count)]


@cache
def serve(system: System, rate: float, count: int = 120, honest: bool = False) -> Report:
    requests = workload(KINDS, arrivals(rate, count, 1), seed=1, honest=honest)
    return serve_all(system, MACHINE, requests)


@pytest.mark.parametrize("honest", [True, False])
def test_every_request_that_can_keep_its_pace_does(honest: bool) -> None:
    """At a load where all SLOs are feasible: within 2 % of the SLO, each of them, whether the draft's confidences are
    the true chances or far from them."""
    assert max(serve(WHOLE, FEASIBLE, honest=honest).tpot_over_slo) <= 1.02
    assert serve(PLAIN, FEASIBLE).attainment < 0.9, "plain decoding must not suffice"


def test_under_overload_it_beats_every_fixed_length_and_an_even_split() -> None:
    whole = serve(WHOLE, OVERLOAD)
    fixed = [serve(PLAIN, OVERLOAD), *(serve(chains(length), OVERLOAD) for length in range(1, 6))]
    assert max(report.attainment for report in fixed) < 0.95, "there must be an overload"
    assert whole.attainment > max(report.attainment for report in fixed)
    assert whole.goodput > max(report.goodput for report in fixed)
    assert whole.attainment >= serve(EQUAL, OVERLOAD).attainment


def test_the_other_order_degrades_no_worse_than_an_even_split() -> None:
    descending = serve(trees("descending", replace(FULL, order="descending")), OVERLOAD)
    assert descending.attainment >= serve(EQUAL, OVERLOAD).attainment


@pytest.mark.parametrize("policy", [SelectionPolicy(), SelectionPolicy(order="descending", cap=0.0)])
def test_best_effort_requests_never_starve(policy: SelectionPolicy) -> None:
    """Without an SLO beside requests that are hopelessly behind, whose needs go first whatever they cost: at least a
    token in each step."""
    kinds = (
        replace(KINDS[0], share=0.7, tpot=0.001),
        replace(KINDS[1], share=0.3, tpot=float("inf")),
    )
    requests = workload(kinds, [0.0] * 30, seed=3, num_output=48)
    report = serve_all(trees("needs first", policy), MACHINE, requests)
    free = [
        seconds
        for seconds, request in zip(report.tpot, requests, strict=True)
        if request.kind.tpot == float("inf")
    ]
    longest = MACHINE.target.seconds(MACHINE.max_rows, 10**6) + 8 * MACHINE.draft.seconds(90, 0)
    assert len(free) > 5
    assert max(free) <= longest


def test_speculation_shrinks_as_the_load_rises() -> None:
    reports = [serve(WHOLE, rate) for rate in (1.0, FEASIBLE, 3 * OVERLOAD)]
    assert reports[0].mean_depth > reports[1].mean_depth > reports[2].mean_depth
    assert reports[0].tokens_per_step > reports[1].tokens_per_step > reports[2].tokens_per_step


def test_learned_chances_do_as_well_as_known_ones() -> None:
    """The draft says something far from the truth; what the table makes of it costs at most 3 % of the tokens."""
    learned, known = (serve(WHOLE, FEASIBLE, honest=honest) for honest in (False, True))
    assert learned.tokens_per_step >= 0.97 * known.tokens_per_step


def test_the_workload_is_what_it_says() -> None:
    requests = workload(KINDS, [0.0] * 2000, seed=0)
    names = [request.kind.name for request in requests]
    assert names.count("code") / 2000 == pytest.approx(0.6, abs=0.04)
    for rank in range(3):
        hits = np.mean([np.equal(request.outcome, rank).mean() for request in requests])
        said = np.mean([request.chances[:, rank].mean() for request in requests])
        assert hits == pytest.approx(said, abs=0.01)
    again = workload(KINDS, [0.0] * 2000, seed=0)
    assert all((a.outcome == b.outcome).all() for a, b in zip(requests, again, strict=True))


@pytest.mark.slow
def test_the_script(repository: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(repository / "bench" / "slo_simulation.py"), *arguments],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=600,
        )

    shown = run("--quick", "--seeds", "1", "--json", "--out", str(tmp_path / "out.json"))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert 0.6 <= found["best_fixed_attainment"] <= 0.9
    assert found["slo_violation_ratio"] > 1.3
    assert found["goodput_ratio"] > 1.1
    assert {"plain", "equal split", "+ SLO selection", "+ throughput selection"} <= set(found["systems"])
    short = tmp_path / "trace.csv"
    short.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    for arguments, wanted in {
        ("--seeds", "one"): "--seeds must be whole numbers",
        ("--seeds", "-1"): "--seeds must be at least 0",
        ("--trace", str(tmp_path / "none")): "a file",
        ("--trace", str(short), "--quick"): "--trace has 1 requests",
        ("--workers", "0"): "--workers must be at least 1",
    }.items():
        refused = run(*arguments)
        assert refused.returncode == 2
        assert wanted in refused.stderr
