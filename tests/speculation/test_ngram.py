"""Proposals from the sequence's own text and from a corpus, against a search of the texts."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.speculation.test_suffix_automaton import contexts, ends_of
from tokenloom.engine.proposer import Proposal, Proposer, Wanted
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.sequence import Sequence
from tokenloom.engine.token_tree import TokenTree
from tokenloom.errors import InvalidParameter
from tokenloom.speculation.corpus import index_corpus, read_corpus
from tokenloom.speculation.ngram import NUM_BACKOFFS, NgramProposer

PHRASE = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def sequence(tokens: list[int]) -> Sequence:
    request = Request(request_id="a", prompt_token_ids=tokens, params=SamplingParams())
    return Sequence(request, 0, root=b"", max_length=1 << 20, stop_ids=frozenset(), checker=None)


def ask(
    proposer: NgramProposer, seq: Sequence, *, depth: int = 8, nodes: int = 8, width: int = 1
) -> Proposal:
    return proposer.propose([Wanted(seq, depth, nodes, width)])[0]


def check(proposal: Proposal, depth: int, nodes: int, width: int) -> None:
    """Everything the protocol says about a proposal, and nodes in the order of their paths' probability."""
    reaches: list[float] = []
    for parent, confidence in zip(proposal.parents, proposal.confidences, strict=True):
        reaches.append(confidence * (1.0 if parent < 0 else reaches[parent]))
    tree = TokenTree(proposal.tokens, proposal.parents, reaches, [()] * len(proposal.tokens))
    tree.check()
    assert len(proposal.ranks) == len(tree) <= nodes
    assert max(tree.depths(), default=0) <= depth
    assert all(a >= b - 1e-12 for a, b in pairwise(reaches))
    for parent in set(proposal.parents):
        family = [node for node in range(len(tree)) if proposal.parents[node] == parent]
        assert len(family) <= width
        assert [proposal.ranks[node] for node in family] == list(range(len(family)))
        assert sum(proposal.confidences[node] for node in family) < 1


def expected_children(text: list[int], min_match: int, width: int) -> dict[int, float]:
    """The formula of the docstring over a search of the text."""
    scores: Counter[int] = Counter()
    escape = 1.0
    for length in [size for size in contexts(text) if size >= min_match][: NUM_BACKOFFS + 1]:
        followed = Counter(text[end + 1] for end in ends_of(text[-length:], text)[:-1])
        bottom = length * followed.total() + 3 * len(followed)
        for token, count in followed.items():
            scores[token] += escape * length * count / bottom  # type: ignore[assignment]
        escape *= 3 * len(followed) / bottom
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:width])


def test_it_is_a_proposer() -> None:
    proposer: Proposer = NgramProposer()
    assert proposer.name == "ngram"
    proposer.close()


def test_a_copied_phrase_goes_on() -> None:
    proposer = NgramProposer()
    proposal = ask(proposer, sequence([1, *PHRASE, 2, 3, *PHRASE[:2]]))
    assert proposal.tokens == PHRASE[2:]
    assert proposal.parents == list(range(-1, 7))
    assert proposal.ranks == [0] * 8
    # l / (l + 3) after a context of l tokens that was seen once.
    assert proposal.confidences == pytest.approx([l / (l + 3) for l in range(2, 10)], abs=1e-15)  # noqa: E741


def test_a_text_that_repeats_itself_goes_on_beyond_its_end() -> None:
    proposer = NgramProposer()
    assert ask(proposer, sequence([7] * 40)).tokens == [7] * 8
    assert ask(proposer, sequence([7, 8] * 20)).tokens == [7, 8] * 4
    assert ask(proposer, sequence([1, 2, 3, 1, 2, 3])).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def test_nothing_is_known() -> None:
    proposer = NgramProposer(min_match=2)
    for tokens in ([], [5], [5, 6], list(range(100)), [5, 6, 5]):
        assert ask(proposer, sequence(tokens)) == Proposal()
    assert ask(NgramProposer(), sequence([5, 6, 5])).tokens == [6, 5, 6, 5, 6, 5, 6, 5]


def test_several_continuations_make_a_tree() -> None:
    #        1 2 → 3 twice, → 4 once, → 5 never after the longer context 9 1 2
    seq = sequence([1, 2, 3, 0, 6, 1, 2, 4, 0, 8, 1, 2, 3, 0, 7, 1, 2])
    wide = ask(NgramProposer(), seq, depth=1, width=4)
    assert wide.tokens == [3, 4]
    assert wide.ranks == [0, 1]
    assert wide.confidences == pytest.approx([4 / 12, 2 / 12])
    assert ask(NgramProposer(), seq, depth=1, width=1).tokens == [3]
    tree = ask(NgramProposer(), seq, depth=3, nodes=5, width=2)
    check(tree, 3, 5, 2)
    assert sorted(zip(tree.parents, tree.tokens, strict=True))[:2] == [(-1, 3), (-1, 4)]


def test_a_shorter_context_adds_what_the_longest_does_not_know() -> None:
    # 9 1 2 was followed by 5; 1 2 by 3, too, twice.
    seq = sequence([1, 2, 3, 0, 1, 2, 3, 6, 9, 1, 2, 5, 7, 9, 1, 2])
    proposal = ask(NgramProposer(), seq, depth=1, width=4)
    assert proposal.tokens == [5, 3]
    first = 3 / 6 + 3 / 6 * 2 / (2 * 3 + 6)
    assert proposal.confidences == pytest.approx([first, 3 / 6 * 4 / 12])


TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size), max_size=40))


@given(TEXTS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12))
def test_any_text(text: list[int], min_match: int, width: int, depth: int, nodes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenloom.speculation.suffix_automaton.MAX_CHAIN", 1 << 30)
        proposal = ask(
            NgramProposer(min_match=min_match), sequence(text), depth=depth, nodes=nodes, width=width
        )
    check(proposal, depth, nodes, width)
    roots = {
        token: confidence
        for token, parent, confidence in zip(
            proposal.tokens, proposal.parents, proposal.confidences, strict=True
        )
        if parent < 0
    }
    expected = expected_children(text, min_match, width)
    if nodes >= width and depth == 1:
        assert sorted(roots.values()) == pytest.approx(sorted(expected.values()))
    assert bool(roots) == bool(expected)
    everything = expected_children(text, min_match, 1000)
    for token, confidence in roots.items():
        assert confidence == pytest.approx(everything[token])


@given(TEXTS, st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_growing_sequence_equals_a_fresh_one(text: list[int], pieces: list[int]) -> None:
    corpus = index_corpus([[0, 1, 2, 0, 1, 1], [2, 2, 1, 0]], 10, 100)
    grown = NgramProposer(corpus=corpus)
    seq = sequence(text[:1])
    done = 1
    for piece in pieces:
        proposal = ask(grown, seq, width=3)
        assert proposal == ask(NgramProposer(corpus=corpus), sequence(seq.tokens), width=3)
        for token in text[done : done + piece]:
            seq.append(token)
        done += piece


def test_a_long_prompt_is_indexed_bit_by_bit() -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(1000) for _ in range(5000)]
    long, short = sequence([*prompt, *prompt[:3]]), sequence([1, *PHRASE, 2, 3, *PHRASE[:2]])
    proposer = NgramProposer(tokens_per_call=600)
    calls = 0
    while True:
        calls += 1
        before = proposer.num_indexed
        first, second = proposer.propose([Wanted(long, 8, 8, 1), Wanted(short, 8, 8, 1)])
        assert proposer.num_indexed - before <= 600
        assert second.tokens == PHRASE[2:], "a long prompt must not hold up others"
        if proposer.num_indexed < 5003 + 15:
            assert first == Proposal()
        else:
            assert first.tokens == prompt[3:11]
            break
    assert calls == 9
    proposer.forget(long)
    assert proposer.num_indexed == 15
    proposer.forget(long)
    proposer.forget(sequence([]))
    proposer.forget(short)
    assert proposer.num_indexed == 0


def test_indexes_are_bounded() -> None:
    rng = random.Random(1)
    seq = sequence([rng.randrange(50) for _ in range(300)])
    proposer = NgramProposer(max_tokens=200)
    for _ in range(500):
        ask(proposer, seq)
        assert proposer.num_indexed <= 200
        seq.append(rng.randrange(50))
    # What the window still has is found again.
    for token in seq.tokens[-40:-30]:
        seq.append(token)
    expected = seq.tokens[-40:-32]
    assert ask(proposer, seq).tokens == expected


def test_indexes_of_all_sequences_are_bounded() -> None:
    rng = random.Random(2)
    sequences = [sequence([1, *PHRASE, *(rng.randrange(100, 900) for _ in range(60))]) for _ in range(40)]
    proposer = NgramProposer(max_total_tokens=1000, tokens_per_call=10_000)
    for number in (1, 5, 40, 12, 40):
        for seq in sequences[:number]:
            for token in seq.tokens[-5:]:
                seq.append(token)
        for _ in range(3):
            proposals = proposer.propose([Wanted(seq, 4, 4, 1) for seq in sequences[:number]])
            assert proposer.num_indexed <= 1000
        assert all(proposal.tokens for proposal in proposals)
    for seq in sequences:
        proposer.forget(seq)
    assert proposer.num_indexed == 0


def test_a_corpus_goes_on_where_the_text_is_new() -> None:
    corpus = index_corpus([[30, 31, *PHRASE], [40, 41, 42]], 100, 100)
    proposer = NgramProposer(min_match=2, corpus=corpus)
    assert ask(proposer, sequence([5, *PHRASE[:3]])).tokens == PHRASE[3:]
    assert ask(proposer, sequence([5, *PHRASE])) == Proposal(), "nothing crosses from a document to the next"
    assert ask(proposer, sequence([5, 20, 40])) == Proposal()
    # The longer context has more to say, wherever it is.
    own = sequence([13, 14, 50, 51, 52, *PHRASE[:4]])
    both = ask(proposer, own, depth=1, width=2)
    assert both.tokens == [15, 50]
    assert both.confidences == pytest.approx([4 / 7, 3 / 7 * 2 / 5])


@pytest.mark.parametrize("name", ["min_match", "max_tokens", "max_total_tokens", "tokens_per_call"])
def test_options_are_checked(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(InvalidParameter) as error:
        NgramProposer(**options)
    assert error.value.param == name


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_files_of_documents(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("one two\nthree\n\n\nfour five six")
    corpus = read_corpus(text, encode, 200, 100)
    proposer = NgramProposer(min_match=2, corpus=corpus)
    assert ask(proposer, sequence(encode("tw"))).tokens == encode("o\nthree\n")
    assert ask(proposer, sequence(encode("\nt"))).tokens[:5] == encode("hree\n")
    assert ask(proposer, sequence(encode("\nf"))) == Proposal(), "an empty line parts documents"
    lines = tmp_path / "corpus.jsonl"
    lines.write_text('"four five"\n\n{"text": "six seven", "id": 3}\n[5, 6, 7, 8]\n')
    proposer = NgramProposer(corpus=read_corpus(lines, encode, 200, 100))
    for start, rest in (("fo", "ur five"), ("ix", " seven")):
        assert ask(proposer, sequence(encode(start)), nodes=len(rest)).tokens == encode(rest)
    assert ask(proposer, sequence([5, 6])).tokens == [7, 8]


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'"ok"\n{"texts": "no"}', "line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b"[1, 2, 200]", "token id"),
        ("a.jsonl", b"[1, -1]", "token id"),
        ("a.jsonl", b"[1, true]", "token id"),
        ("a.jsonl", b"[1, 2.0]", "token id"),
        ("a.jsonl", b'["x"]', "token id"),
        ("a.jsonl", b"[" + b"1," * 100 + b"1]", "a.jsonl"),
        ("a.txt", b"abc\n\xff\xfe", "line 2"),
        ("a.txt", b"x" * 60 + b"\n\n" + b"y" * 60, "a.txt"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, field: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidParameter) as error:
        read_corpus(path, encode, 200, 100)
    assert field in error.value.param
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["x" * 50, "x" * 30 + "\n" + "y" * 30])
def test_long_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr("tokenloom.speculation.corpus.MAX_LINE", 40)
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(InvalidParameter, match="at most 40"):
        read_corpus(path, encode, 200, 100)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(InvalidParameter):
            read_corpus(path, encode, 200, 100)
