"""Paces, budgets and depths against their definitions and exhaustive search."""

from __future__ import annotations

import random
from math import inf

import numpy as np
import pytest

from tests.engine.test_tree_selection import beams, grow, random_tree
from tokenloom.engine.policies.latency_curve import LatencyCurve
from tokenloom.engine.policies.pace import (
    DraftGate,
    Needs,
    Pace,
    ShapeRule,
    TimePrice,
    choose_budget,
    needs_of,
)
from tokenloom.engine.policies.tree_selection import RankedTrees
from tokenloom.engine.token_tree import TokenTree
from tokenloom.runtime.simulated import CostModel

MEMORY_BOUND = CostModel(memory_bound=0.030, per_row=0.0005, per_key=0.0, fixed=0.0)
COMPUTE_BOUND = CostModel(memory_bound=0.0, per_row=0.010, per_key=0.0, fixed=0.0001)


def curve_of(machine: CostModel) -> LatencyCurve:
    curve = LatencyCurve()
    for _ in range(20):
        for rows in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512):
            curve.observe(rows, 0, machine.seconds(rows, 0))
    return curve


def chain(depth: int, chance: float) -> TokenTree:
    tree = TokenTree()
    for level in range(depth):
        grow(tree, level - 1, 0, chance)
    return tree


def test_the_need_is_the_formula_of_the_paper() -> None:
    pace = Pace(tpot=0.05)
    assert pace.need(3.0, 0.03) == pytest.approx(0.03 / 0.05), "before its first step a request has no lag"
    pace.begin(10.0)
    pace.begin(12.0)
    pace.produced = 7
    assert pace.need(10.5, 0.03) == pytest.approx((0.5 + 0.03) / 0.05 - 7)
    assert Pace().need(10.5, 0.03) == 0


def test_needs_of_a_step_are_those_of_its_requests() -> None:
    paces = [Pace(0.05, 10.0, 7), Pace(), Pace(0.03, 9.0, 0), Pace(0.1)]
    needs = needs_of(paces, 10.5, depth=4)
    for seconds in (0.01, 0.2):
        wanted = [min(5.0, pace.need(10.5, seconds)) for pace in paces]
        assert needs.at(seconds).tolist() == pytest.approx(wanted)
    assert needs.at(np.array([0.01, 0.2])).shape == (2, 4)


def test_depth_and_width_fall_with_the_load() -> None:
    rule = ShapeRule(verify_rows=128, draft_rows=96, c1=1, c2=0, min_depth=1, max_depth=8, max_width=3)
    assert rule.shape(4) == (8, 3)
    assert rule.shape(64) == (1, 1)
    assert rule.shape(20) == (128 // 21 - 1, 3)
    shapes = [rule.shape(requests) for requests in range(1, 200)]
    assert all(a >= b for a, b in zip([d for d, _ in shapes], [d for d, _ in shapes][1:], strict=False))
    assert all(a >= b for a, b in zip([w for _, w in shapes], [w for _, w in shapes][1:], strict=False))
    assert ShapeRule(min_depth=4).shape(500) == (4, 1)


def test_who_has_lost_the_slo_needs_nothing_any_more() -> None:
    """100 tokens to go at 50 ms each; behind by 90 tokens, which only 5 ms a token could make up for."""
    behind, late = Pace(0.05, 0.0, 10), Pace(0.05, 0.0, 60)
    now = 5.0
    needs = needs_of([behind, late, Pace()], now, depth=4, remaining=[100, 100, 100], fastest=0.02)
    assert needs.at(0.05).tolist() == pytest.approx([0.0, 5.0, 0.0])
    needs = needs_of([behind, late, Pace()], now, depth=4, remaining=[100, 100, 100], fastest=0.004)
    assert needs.at(0.05).tolist() == pytest.approx([5.0, 5.0, 0.0])


@pytest.mark.parametrize("machine", [MEMORY_BOUND, COMPUTE_BOUND])
@pytest.mark.parametrize("requests", [1, 4, 30])
def test_the_budget_is_the_best_of_all(machine: CostModel, requests: int) -> None:
    """Within 2 % of the best rate over every budget: the grid is finer than the curve's bends."""
    rng = random.Random(requests)
    trees = [random_tree(rng, 20) for _ in range(requests)]
    ranked, curve = RankedTrees(trees), curve_of(machine)
    gains = sorted((reach for tree in trees for reach in tree.reaches), reverse=True)
    rates = [
        (requests + sum(gains[:nodes])) / curve.seconds(requests + nodes, 0)
        for nodes in range(len(gains) + 1)
    ]
    found = choose_budget(ranked, curve, 0, limit=10_000)
    assert rates[found.rows - requests] >= 0.98 * max(rates)
    assert found.seconds == pytest.approx(curve.seconds(found.rows, 0))


def test_speculation_is_off_where_rows_cost_what_they_bring() -> None:
    trees = [chain(4, 0.6) for _ in range(8)]
    ranked = RankedTrees(trees)
    assert choose_budget(ranked, curve_of(COMPUTE_BOUND), 0, limit=100).rows == 8
    assert choose_budget(ranked, curve_of(MEMORY_BOUND), 0, limit=100).rows == 40
    assert choose_budget(ranked, curve_of(MEMORY_BOUND), 0, limit=20).rows == 20
    assert choose_budget(ranked, curve_of(MEMORY_BOUND), 0, limit=3).rows == 8, "roots are never cut"


def test_other_work_beside_the_trees_counts() -> None:
    """Prompt rows that fill the step past the knee leave nothing for free."""
    trees = [chain(8, 0.3) for _ in range(4)]
    curve = curve_of(CostModel(memory_bound=0.030, per_row=0.0005, per_key=0.0, fixed=0.0))
    alone = choose_budget(RankedTrees(trees), curve, 0, limit=512).rows
    beside = choose_budget(RankedTrees(trees), curve, 0, limit=512, other_rows=200)
    assert alone > 12
    assert beside.seconds > 0.1


def test_drafting_that_is_paid_makes_more_rows_worth_it() -> None:
    trees = [chain(8, 0.5) for _ in range(4)]
    curve = curve_of(CostModel(memory_bound=0.004, per_row=0.001, per_key=0.0, fixed=0.0))
    ranked = RankedTrees(trees)
    free, paid = (choose_budget(ranked, curve, 0, limit=512, overhead=spent).rows for spent in (0.0, 0.05))
    assert paid > free


def test_a_token_that_a_need_asks_for_counts_more() -> None:
    """At 0.06 tokens for a millisecond a node must bring 0.6; one that keeps a pace need only bring 0.3."""
    ranked, curve = RankedTrees([chain(2, 0.5) for _ in range(4)]), curve_of(COMPUTE_BOUND)
    assert choose_budget(ranked, curve, 0, limit=100, price=60).rows == 4
    needs = Needs(np.array([1.4, 0, 0, 0]), np.array([1e-6, 0, 0, 0]), 3.0)
    assert choose_budget(ranked, curve, 0, limit=100, needs=needs, price=60).rows == 5
    assert choose_budget(ranked, curve, 0, limit=100, needs=needs, price=60, boost=1.0).rows == 4


@pytest.mark.parametrize("price", [1.0, 20.0, 60.0, 1500.0, 10_000.0])
def test_with_a_price_every_row_pays_that_is_verified(price: float) -> None:
    """The best surplus over every budget, also beside a long prompt, which changes nothing past the knee."""
    rng = random.Random(3)
    trees = [random_tree(rng, 20) for _ in range(6)]
    ranked, curve = RankedTrees(trees), curve_of(MEMORY_BOUND)
    gains = sorted((reach for tree in trees for reach in tree.reaches), reverse=True)
    for other in (0, 300):
        surplus = [
            sum(gains[:nodes]) - price * curve.seconds(6 + nodes + other, 0)
            for nodes in range(len(gains) + 1)
        ]
        rows = choose_budget(ranked, curve, 0, limit=1000, other_rows=other, price=price).rows
        assert surplus[rows - 6] == pytest.approx(max(surplus))
    # By the rate of its own step, the prompt would make nodes pay that cost more than they bring.
    own = choose_budget(ranked, curve, 0, limit=1000, other_rows=300).rows
    assert own > choose_budget(ranked, curve, 0, limit=1000, other_rows=300, price=1500).rows


def test_the_price_of_time_is_the_rate_of_decoding() -> None:
    price = TimePrice()
    assert price.rate == 0
    for _ in range(200):
        price.observe(10, 0.02)
        price.observe(20, 0.06)
    assert price.rate == pytest.approx(15 / 0.04, rel=0.05)
    for _ in range(200):
        price.observe(1, 0.01)
    assert price.rate == pytest.approx(100, rel=0.01)


def test_a_curve_that_knows_nothing_is_explored_step_by_step() -> None:
    ranked, curve = RankedTrees([chain(40, 0.9)]), LatencyCurve()
    seen = []
    for _ in range(30):
        rows = choose_budget(ranked, curve, 0, limit=64).rows
        seen.append(rows)
        curve.observe(rows, 0, MEMORY_BOUND.seconds(rows, 0))
    assert seen[0] == 2
    assert all(b <= 2 * max(seen[: i + 1]) for i, b in enumerate(seen[1:]))
    assert seen[-1] == 41


def test_no_trees_and_no_requests() -> None:
    curve = curve_of(MEMORY_BOUND)
    assert choose_budget(RankedTrees([TokenTree(), TokenTree()]), curve, 0, limit=100).rows == 2
    assert choose_budget(RankedTrees([]), curve, 0, limit=100).rows == 0


def test_with_a_price_the_depth_has_the_best_surplus() -> None:
    curve, gains, rows = curve_of(MEMORY_BOUND), [0.8, 0.5, 0.3, 0.1], [1.5, 0.9, 0.5, 0.1]
    for price in (50.0, 1000.0, 1800.0, 5000.0):
        surplus = [
            40 * (1 + sum(gains[:depth]))
            - price * (curve.seconds(round(40 * (1 + sum(rows[:depth]))), 0) + 0.002 * depth)
            for depth in range(5)
        ]
        found = DraftGate(probe_share=0.0).depth(
            gains, curve, 0, requests=40, other_rows=0, level_seconds=0.002, rows=rows, price=price
        )
        assert found == surplus.index(max(surplus))


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("level_seconds", [0.0005, 0.005, 0.015])
def test_the_depth_is_the_best_of_all(chance: float, level_seconds: float) -> None:
    curve, gains = curve_of(MEMORY_BOUND), [chance**level for level in range(1, 9)]
    rates = [
        (1 + sum(gains[:depth])) / (curve.seconds(4 * (1 + depth), 0) + depth * level_seconds)
        for depth in range(9)
    ]
    found = DraftGate().depth(gains, curve, 0, requests=4, other_rows=0, level_seconds=level_seconds)
    assert found == rates.index(max(rates)) or (found == 1 and rates.index(max(rates)) == 0)


def test_a_draft_that_does_not_pay_is_tried_seldom() -> None:
    gate, curve = DraftGate(), curve_of(MEMORY_BOUND)
    gains = [0.1, 0.01, 0.001]
    depths = [gate.depth(gains, curve, 0, requests=1, other_rows=0, level_seconds=0.02) for _ in range(2000)]
    probes = sum(depth > 0 for depth in depths)
    assert probes >= 3
    assert probes * 0.02 <= 0.0051 * sum(0.03 for _ in depths)


def test_what_the_gate_does_without_anything_to_decide() -> None:
    curve = curve_of(MEMORY_BOUND)
    assert DraftGate().depth([], curve, 0, requests=1, other_rows=0, level_seconds=0.01) == 0
    assert DraftGate().depth([0.5], curve, 0, requests=0, other_rows=0, level_seconds=0.01) == 0
    assert DraftGate().depth([0.5], LatencyCurve(), 0, requests=1, other_rows=0, level_seconds=inf) == 1


def test_a_decision_for_256_requests_is_cheap() -> None:
    from time import perf_counter

    ranked, curve = RankedTrees(beams(256)), curve_of(MEMORY_BOUND)
    needs = needs_of([Pace(0.05, 0.0, i % 50) for i in range(256)], 1.5, depth=8)

    def seconds() -> float:
        started = perf_counter()
        choose_budget(ranked, curve, 0, limit=1024, needs=needs)
        return perf_counter() - started

    assert min(seconds() for _ in range(20)) < 5e-3
