"""A suffix automaton over token ids that grows token by token.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (Theoretical Computer Science 1985): a
state is a set of substrings that end at the same places of the text. Its transitions are the tokens that ever
followed these substrings, its suffix link leads to the longest shorter context that also occurs elsewhere. A text
of n tokens has at most 2n states and 3n transitions, and appending a token takes amortised constant time.

```
text  a b c a b          last = "abcab" ──link──▶ "ab" (the longest suffix that occurred before)
                                                   └──c──▶ "abc"     what followed it
```
"""

from __future__ import annotations

from typing import Final, NamedTuple

SEPARATOR: Final = -1
"""A token that no text has: put between documents, it keeps every match within one of them."""

MAX_CHAIN: Final = 16
"""Suffix links along which an appended token updates counts and ends. Contexts beyond them, which only exist in
texts that repeat themselves over and over, keep lower bounds; so the cost of a token stays bounded."""

MAX_BRANCHES: Final = 64
"""Continuations of one context that are looked at, in the order in which the text showed them."""

_NONE: Final = -2
_ROOT: Final = 0


class Continuation(NamedTuple):
    """A token that followed a context so many times, and the state of the context with that token."""

    token: int
    target: int
    times: int


class SuffixAutomaton:
    """The substrings of a text, state by state; state 0 is the empty context.

    Nearly every state has one transition, so that one lies in two lists and only the others in a dictionary.
    """

    __slots__ = (
        "_counts",
        "_ends",
        "_first",
        "_last",
        "_lengths",
        "_links",
        "_more",
        "_targets",
        "num_tokens",
    )

    def __init__(self) -> None:
        self.num_tokens = 0
        self._last = _ROOT
        self._lengths = [0]
        self._links = [-1]
        self._first = [_NONE]
        self._targets = [0]
        self._more: dict[int, dict[int, int]] = {}
        self._counts = [0]
        self._ends = [-1]

    @property
    def num_states(self) -> int:
        """At most twice the tokens."""
        return len(self._lengths)

    def append(self, token: int) -> None:
        """Extend the text by one token (or `SEPARATOR`)."""
        lengths, links, first, targets, more = (
            self._lengths,
            self._links,
            self._first,
            self._targets,
            self._more,
        )
        position = self.num_tokens
        new = len(lengths)
        lengths.append(position + 1)
        first.append(_NONE)
        targets.append(0)
        self._counts.append(1)
        self._ends.append(position)
        state = self._last
        found = -1
        while state >= 0:
            seen = first[state]
            if seen == token:
                found = targets[state]
                break
            if seen == _NONE:
                first[state] = token
                targets[state] = new
            elif state in more:
                others = more[state]
                if token in others:
                    found = others[token]
                    break
                others[token] = new
            else:
                more[state] = {token: new}
            state = links[state]
        if state < 0:
            suffix = _ROOT
            links.append(suffix)
        elif lengths[found] == lengths[state] + 1:
            suffix = found
            links.append(suffix)
        else:
            links.append(_ROOT)
            suffix = self._split(state, token, found)
            links[new] = suffix
        self._last = new
        self.num_tokens = position + 1
        self._count(suffix, position)

    def _split(self, state: int, token: int, whole: int) -> int:
        """Part the substrings of `whole` that are no longer than those of `state` with `token`: they now end at one
        more place than the longer ones. Returns their new state."""
        lengths, links, first, targets, more = (
            self._lengths,
            self._links,
            self._first,
            self._targets,
            self._more,
        )
        part = len(lengths)
        lengths.append(lengths[state] + 1)
        links.append(links[whole])
        links[whole] = part
        first.append(first[whole])
        targets.append(targets[whole])
        if whole in more:
            more[part] = more[whole].copy()
        self._counts.append(self._counts[whole])
        self._ends.append(self._ends[whole])
        while state >= 0:
            if first[state] == token:
                if targets[state] != whole:
                    break
                targets[state] = part
            else:
                others = more[state]
                if others[token] != whole:
                    break
                others[token] = part
            state = links[state]
        return part

    def _count(self, state: int, position: int) -> None:
        counts, ends, links = self._counts, self._ends, self._links
        left = MAX_CHAIN
        while state > _ROOT and left:
            counts[state] += 1
            ends[state] = position
            state = links[state]
            left -= 1

    def match(self) -> tuple[int, int]:
        """The longest suffix of the text that also occurred before, as (state, tokens); (0, 0) if none did. The two
        occurrences may overlap."""
        if not self.num_tokens:
            return _ROOT, 0
        state = self._links[self._last]
        return state, self._lengths[state]

    def shorter(self, state: int) -> tuple[int, int]:
        """The longest suffix of a state's substrings that occurs in other places too: (state, tokens). Of the empty
        context: itself."""
        link = max(self._links[state], _ROOT)
        return link, self._lengths[link]

    def advance(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Where another text stands after its next token, of which the last `length` tokens are in `state`: state
        and tokens of its longest suffix that occurs here. Amortised constant time along that text."""
        while True:
            if self._first[state] == token:
                return self._targets[state], length + 1
            others = self._more.get(state)
            if others is not None and token in others:
                return others[token], length + 1
            if state == _ROOT:
                return _ROOT, 0
            state = self._links[state]
            length = self._lengths[state]

    def occurrences(self, state: int) -> tuple[int, int]:
        """How often a state's substrings occurred, and where the last occurrence ended (its index in the text); both
        are lower bounds beyond `MAX_CHAIN`."""
        return self._counts[state], self._ends[state]

    def continuations(self, state: int) -> list[Continuation]:
        """What followed the context, most frequent first, the most recent first among equals. Empty where the
        context occurred only at the end of the text."""
        token = self._first[state]
        if token < 0 and state not in self._more:
            return []
        counts = self._counts
        if state not in self._more:
            target = self._targets[state]
            return [Continuation(token, target, counts[target])]
        found = [(token, self._targets[state])] if token >= 0 else []
        for token, target in self._more[state].items():
            if token >= 0:
                found.append((token, target))
            if len(found) >= MAX_BRANCHES:
                break
        ends = self._ends
        found.sort(key=lambda pair: (-counts[pair[1]], -ends[pair[1]]))
        return [Continuation(token, target, counts[target]) for token, target in found]
