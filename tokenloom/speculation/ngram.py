"""Look-up of how a text went on the last time it said the same.

The longest suffix of prompt and output that occurred before is found in a suffix automaton of the sequence, and the
longest one that occurs in a corpus in an automaton of that; what followed there is proposed. Saxena, "Prompt Lookup
Decoding" (2023); suffix automata after Hu et al., "SAM Decoding: Speculative Decoding via Suffix Automaton" (2024).
A sequence looks into its own text and the corpus only, never into those of others.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq

from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.sequence import Sequence
from tokenloom.errors import InvalidParameter
from tokenloom.speculation.suffix_automaton import SuffixAutomaton

Context = tuple[SuffixAutomaton, int, int]
"""An automaton, a state of it, and how many tokens of the text agree with it."""

Child = tuple[int, float, tuple[Context, ...]]
"""A token, the confidence in it, and the contexts that know how to go on from there."""

NUM_BACKOFFS = 1
"""Shorter contexts of the sequence's own text that are asked besides the longest, below the root only."""

ESCAPE = 3.0
"""How much a continuation that was never seen weighs: fitted to what programs, essays and stories do."""


class _Text:
    """What is indexed of one sequence: its tokens from `start` to `end`; and where it stands in the corpus."""

    __slots__ = ("automaton", "end", "length", "start", "state")

    def __init__(self, start: int) -> None:
        self.automaton = SuffixAutomaton()
        self.start = start
        self.end = start
        self.state = 0
        self.length = 0


class NgramProposer:
    """Proposes trees from contexts of at least `min_match` tokens.

    The confidence in a token c after a context of l tokens that was followed n times, by d different tokens, n_c
    times by c, is l n_c / (l n + 3 d); the rest, 3 d / (l n + 3 d), goes to the next shorter context, if there is one:
    the estimate of Witten and Bell with an escape (`ESCAPE`) that gets rarer with the length. Nodes are taken in the
    order of the product of their confidences down from the root.

    A sequence keeps an index of at most `max_tokens` of its last tokens, or its even share of `max_total_tokens` where
    that is less; when it is full, it is made anew of half as many. All indexes together never exceed
    `max_total_tokens`. A call indexes at most `tokens_per_call` tokens, those of sequences with the least to catch up
    first, so that a long prompt stalls nobody; until it is indexed, nothing is proposed for it.
    """

    def __init__(
        self,
        *,
        min_match: int = 1,
        max_tokens: int = 32_768,
        max_total_tokens: int = 1 << 19,
        tokens_per_call: int = 1024,
        corpus: SuffixAutomaton | None = None,
    ) -> None:
        for name, value in (
            ("min_match", min_match),
            ("max_tokens", max_tokens),
            ("max_total_tokens", max_total_tokens),
            ("tokens_per_call", tokens_per_call),
        ):
            if value < 1:
                raise InvalidParameter(name, value, "at least 1")
        self._min_match = min_match
        self._max_tokens = max_tokens
        self._max_total_tokens = max_total_tokens
        self._tokens_per_call = tokens_per_call
        self._corpus = corpus
        self._texts: dict[Sequence, _Text] = {}
        self._num_indexed = 0

    @property
    def name(self) -> str:
        return "ngram"

    @property
    def num_indexed(self) -> int:
        """Tokens in the indexes of all sequences."""
        return self._num_indexed

    def propose(self, wanted: Seq[Wanted]) -> list[Proposal]:
        """A tree for each; empty where no context is long enough or the text is not indexed yet."""
        self._catch_up(wanted)
        return [self._tree(item) for item in wanted]

    def forget(self, seq: Sequence) -> None:
        text = self._texts.pop(seq, None)
        if text is not None:
            self._num_indexed -= text.automaton.num_tokens

    def close(self) -> None:
        self._texts.clear()
        self._num_indexed = 0

    def _catch_up(self, wanted: Seq[Wanted]) -> None:
        known = sum(item.seq not in self._texts for item in wanted) + len(self._texts)
        limit = max(1, min(self._max_tokens, self._max_total_tokens // max(1, known)))
        behind = []
        for order, item in enumerate(wanted):
            text = self._text(item.seq, limit)
            behind.append((len(item.seq.tokens) - text.end, order))
        left = self._tokens_per_call
        for missing, order in sorted(behind):
            if left <= 0:
                break
            seq = wanted[order].seq
            room = self._max_total_tokens - self._num_indexed
            count = min(missing, left, room)
            self._index(self._texts[seq], seq.tokens, count)
            left -= count

    def _text(self, seq: Sequence, limit: int) -> _Text:
        """The index of `seq`, a fresh one where there is none or where it would have more than `limit` tokens."""
        text = self._texts.get(seq)
        size = len(seq.tokens)
        if text is None or size - text.start > limit:
            self.forget(seq)
            start = 0 if size <= limit else size - limit // 2
            text = self._texts[seq] = _Text(start)
        return text

    def _index(self, text: _Text, tokens: list[int], count: int) -> None:
        fresh = tokens[text.end : text.end + count]
        append = text.automaton.append
        for token in fresh:
            append(token)
        if self._corpus is not None:
            state, length = text.state, text.length
            for token in fresh:
                state, length = self._corpus.advance(state, length, token)
            text.state, text.length = state, length
        text.end += len(fresh)
        self._num_indexed += len(fresh)

    def _tree(self, wanted: Wanted) -> Proposal:
        proposal = Proposal()
        text = self._texts[wanted.seq]
        if text.end != len(wanted.seq.tokens):
            return proposal
        # Candidates by falling probability of their path; the second entry makes the order total and repeatable.
        waiting: list[tuple[float, int, int, int, int, Child]] = []
        number = 0
        parent, depth, reach = -1, 0, 1.0
        contexts = self._contexts(text)
        while True:
            if depth < wanted.max_depth:
                for rank, child in enumerate(self._children(contexts, wanted.width)):
                    number += 1
                    heapq.heappush(waiting, (-reach * child[1], number, parent, depth + 1, rank, child))
            if not waiting or len(proposal.tokens) >= wanted.max_nodes:
                return proposal
            cost, _, above, depth, rank, (token, confidence, contexts) = heapq.heappop(waiting)
            reach = -cost
            parent = len(proposal.tokens)
            proposal.tokens.append(token)
            proposal.parents.append(above)
            proposal.ranks.append(rank)
            proposal.confidences.append(confidence)

    def _contexts(self, text: _Text) -> tuple[Context, ...]:
        """Contexts of the root, longest first: of the sequence's own text and of the corpus."""
        found: list[Context] = []
        state, length = text.automaton.match()
        while length >= self._min_match and len(found) <= NUM_BACKOFFS:
            found.append((text.automaton, state, length))
            state, length = text.automaton.shorter(state)
        if self._corpus is not None and text.length >= self._min_match:
            found.append((self._corpus, text.state, text.length))
            found.sort(key=lambda context: -context[2])
        return tuple(found)

    def _children(self, contexts: tuple[Context, ...], width: int) -> list[Child]:
        """At most `width` tokens after the contexts, best first."""
        scores: dict[int, float] = {}
        known: dict[int, tuple[Context, ...]] = {}
        escape = 1.0
        for automaton, state, length in contexts:
            found = automaton.continuations(state)
            while not found:
                # The end of the text: what followed a shorter context is all there is.
                state, length = automaton.shorter(state)
                if length < self._min_match:
                    break
                found = automaton.continuations(state)
            if not found:
                continue
            unseen = ESCAPE * len(found)
            share = escape / (length * sum(entry.times for entry in found) + unseen)
            for token, target, count in found:
                after = (automaton, target, length + 1)
                if token not in scores:
                    scores[token] = share * length * count
                    known[token] = (after,)
                else:
                    scores[token] += share * length * count
                    if all(context[0] is not automaton for context in known[token]):
                        known[token] += (after,)
            escape = share * unseen
        if len(scores) == 1:
            token, score = scores.popitem()
            return [(token, score, known[token])]
        best = heapq.nlargest(width, scores, key=scores.__getitem__)
        return [(token, scores[token], known[token]) for token in best]
