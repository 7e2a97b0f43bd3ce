"""The automaton against a search of the whole text."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.speculation import suffix_automaton
from tokenloom.speculation.suffix_automaton import MAX_BRANCHES, SEPARATOR, SuffixAutomaton

TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size), max_size=60))


def indexed(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    return automaton


def ends_of(context: list[int], text: list[int]) -> list[int]:
    """Where `context` ends in `text`."""
    size = len(context)
    return [end for end in range(size - 1, len(text)) if text[end - size + 1 : end + 1] == context]


def contexts(text: list[int]) -> list[int]:
    """Lengths of the suffixes that the automaton tells apart: each is the longest with its places, and has others
    than the whole text."""
    lengths: list[int] = []
    places = 1
    for size in range(len(text) - 1, 0, -1):
        found = len(ends_of(text[-size:], text))
        if found > places:
            lengths.append(size)
            places = found
    return lengths


def transitions(automaton: SuffixAutomaton) -> int:
    more = automaton._more.values()
    return sum(target > 0 for target in automaton._targets) + sum(map(len, more))


@given(TEXTS)
def test_matches_and_continuations(text: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix_automaton, "MAX_CHAIN", 1 << 30)
        automaton = indexed(text)
    state, length = automaton.match()
    for expected in [*contexts(text), 0]:
        assert length == expected
        if not length:
            break
        context = text[-length:]
        ends = ends_of(context, text)
        assert automaton.occurrences(state) == (len(ends), ends[-1])
        followed = Counter(text[end + 1] for end in ends[:-1])
        latest = {text[end + 1]: end for end in ends[:-1]}
        order = sorted(followed, key=lambda token: (-followed[token], -latest[token]))
        found = automaton.continuations(state)
        assert [(entry.token, entry.times) for entry in found] == [
            (token, followed[token]) for token in order
        ]
        for entry in found:
            assert automaton.occurrences(entry.target)[0] == len(ends_of([*context, entry.token], text))
        state, length = automaton.shorter(state)


@given(TEXTS)
def test_counts_are_lower_bounds_on_every_text(text: list[int]) -> None:
    automaton = indexed(text)
    state, length = automaton.match()
    while length:
        ends = ends_of(text[-length:], text)
        count, end = automaton.occurrences(state)
        assert 2 <= count <= len(ends)
        assert end in ends
        state, length = automaton.shorter(state)


@given(st.lists(TEXTS, max_size=4), TEXTS)
def test_another_text_walks_through_documents(documents: list[list[int]], other: list[int]) -> None:
    automaton = indexed([token for document in documents for token in (*document, SEPARATOR)])
    state = length = 0
    for end, token in enumerate(other):
        state, length = automaton.advance(state, length, token)
        before = other[: end + 1]
        sizes = [
            size for document in documents for size in range(1, end + 2) if ends_of(before[-size:], document)
        ]
        assert length == max(sizes, default=0)
        if not length:
            assert state == 0
            continue
        context = other[end + 1 - length : end + 1]
        followed = {
            document[place + 1]
            for document in documents
            for place in ends_of(context, document)
            if place + 1 < len(document)
        }
        assert {entry.token for entry in automaton.continuations(state)} == followed


@pytest.mark.parametrize(
    "text",
    [
        [0] * 3000,
        [0, 1] * 1500,
        [0] * 1500 + [1] + [0] * 1499,
        list(range(3000)),
        [0, 1, 0, 0, 1, 0, 1, 0] * 300,
    ],
    ids=["equal", "period 2", "a^n b a^n", "distinct", "period 8"],
)
def test_hard_texts_stay_small(text: list[int]) -> None:
    automaton = indexed(text)
    assert automaton.num_tokens == len(text)
    assert automaton.num_states <= 2 * len(text)
    assert transitions(automaton) <= 3 * len(text)
    _, length = automaton.match()
    context = text[len(text) - length :]
    assert length == 0 or len(ends_of(context, text)) > 1
    assert len(ends_of(text[len(text) - length - 1 :], text)) == 1


def test_memory_of_a_token_is_bounded() -> None:
    # The worst text there is for transitions: n/2 states with a second one each.
    text = [0] * 4000 + [1] * 4000
    tracemalloc.start()
    try:
        automaton = indexed(text)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert automaton.num_tokens == len(text)
    assert used / len(text) < 600


def test_continuations_of_one_context_are_bounded() -> None:
    text = [token for i in range(1, 500) for token in (0, i)]
    automaton = indexed([*text, 0])
    state, length = automaton.match()
    assert length == 1
    found = automaton.continuations(state)
    assert len(found) == MAX_BRANCHES
    assert {entry.token for entry in found} == set(range(1, MAX_BRANCHES + 1))


def test_an_empty_text_matches_nothing() -> None:
    automaton = SuffixAutomaton()
    assert automaton.match() == (0, 0)
    assert automaton.continuations(0) == []
    assert automaton.shorter(0) == (0, 0)
    assert automaton.advance(0, 0, 7) == (0, 0)
