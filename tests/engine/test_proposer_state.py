"""What is remembered of a proposer: the worth of its levels, its tries, and its rests."""

from __future__ import annotations

import pytest

from tests.engine.helpers import request
from tokenloom.engine.prefix_cache import root_digest
from tokenloom.engine.proposer_state import REST, ProposerState, learn_levels
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import TokenTree
from tokenloom.speculation.replay import ReplayProposer


def state() -> ProposerState:
    return ProposerState(ReplayProposer({}, (1.0,), 10))


def sequence(name: str) -> Sequence:
    asked = request(name, range(4, 9), max_tokens=20)
    return Sequence(asked, 0, root=root_digest(()), max_length=25, stop_ids=frozenset(), checker=None)


def taught(source: ProposerState, values: list[float], rows: list[int], steps: int = 300) -> ProposerState:
    """`steps` steps of ten requests."""
    for _ in range(steps):
        source.asks(len(values), 10)
        source.known = len(values)
        source.learn(values, rows)
    return source


def test_levels_bring_what_was_observed() -> None:
    values, rows = taught(state(), [8, 4, 0], [20, 10, 5]).levels(3)
    assert values == pytest.approx([0.8, 0.4, 0.0], abs=1e-3)
    assert rows == pytest.approx([2.0, 1.0, 0.5], abs=1e-3)


def test_levels_that_were_never_asked_for_fall_off_as_the_last_one() -> None:
    values, rows = taught(state(), [8, 4], [20, 10]).levels(4)
    assert values == pytest.approx([0.8, 0.4, 0.2, 0.1], abs=1e-3)
    assert rows == pytest.approx([2.0, 1.0, 1.0, 1.0], abs=1e-3)
    assert state().levels(3)[0] == pytest.approx([0.6, 0.36, 0.216])
    assert taught(state(), [0], [10], steps=5000).levels(3)[0] == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_level_that_is_not_asked_for_any_more_follows_the_ones_above() -> None:
    source = taught(state(), [8, 4, 2], [10, 10, 10])
    values, _ = taught(source, [4], [10]).levels(3)
    assert values == pytest.approx([0.4, 0.2, 0.1], abs=0.01)


def test_a_deep_level_is_bounded_where_the_one_above_rises_from_nothing() -> None:
    """What two proposers suggest counts for the first: the second one's first levels bring nothing, and its deep ones
    do. A step with shallow trees in which it brings one token there says next to nothing of the deep ones."""
    source = taught(state(), [0, 0, 8, 8], [0, 0, 10, 10], steps=1000)
    source.asks(2, 2)
    source.known = 0
    source.learn([1, 1], [2, 2])
    values, rows = source.levels(4)
    assert values[2:] == pytest.approx([0.8, 0.8], abs=0.01)
    assert rows[2:] == pytest.approx([1.0, 1.0], abs=0.01)


def test_a_try_counts_for_more() -> None:
    """A draft that was off, or a level more than usual, is asked for too seldom to learn at the usual rate."""
    usual, tried = taught(state(), [5, 5], [10, 10]), taught(state(), [5, 5], [10, 10])
    for source, known in ((usual, 2), (tried, 1)):
        source.asks(2, 10)
        source.known = known
        source.learn([10, 10], [10, 10])
    assert tried.levels(2)[0][0] == usual.levels(2)[0][0]
    assert tried.levels(2)[0][1] > usual.levels(2)[0][1] + 0.03


def test_a_rest_beside_prompts_is_short() -> None:
    source = state()
    source.pause(is_long=True)
    assert [source.rests() for _ in range(REST)] == [True] * (REST - 1) + [False]
    source.pause(is_long=False)
    assert not source.rests()


def test_tokens_that_a_need_asks_for_count_more_and_empty_trees_count_too() -> None:
    """Four requests were asked for. A node that both proposers suggested is the first one's."""
    sources = [state(), state(), state()]
    for source, asked in zip(sources, (2, 1, 0), strict=True):
        source.asked = source.known = asked
        source.requests = 4
    behind, easy = sequence("behind"), sequence("easy")
    first, second = ((0, 0, 0.5),), ((1, 0, 0.5),)
    both = first + second
    trees = {
        behind: TokenTree([5, 6, 7], [-1, 0, -1], [0.5] * 3, [both, first, first]),
        easy: TokenTree([5, 6], [-1, -1], [0.5] * 2, [first, second]),
    }
    seen: list[tuple[list[float], list[int]]] = []
    for source in sources:
        source.learn = lambda *found: seen.append(found)  # type: ignore[method-assign,misc,assignment]
    learn_levels(sources, trees, {behind: [0, 1], easy: [1]}, {behind: 1.5, easy: 0.5}, 2.0)
    # The need of 1.5 asks for the token at depth 1 beside the root's, and for no more.
    assert seen == [([2.0, 1.0], [3, 1]), ([1.0], [1])]


def test_a_step_in_which_nobody_was_asked_teaches_nothing() -> None:
    source = state()
    learn_levels([source], {}, {}, {}, 2.0)
    assert source.levels(2)[0] == pytest.approx([0.6, 0.36])


def test_a_call_after_a_rest_says_nothing_of_the_costs() -> None:
    source = state()
    for seconds in (9.0, 0.25, 0.25):
        source.asks(2, 1)
        source.took(2, seconds)
    assert source.costs(2)[2] == 0.25
    source.pause(is_long=True)
    source.asks(2, 1)
    source.took(2, 9.0)
    assert source.costs(2)[2] == 0.25
