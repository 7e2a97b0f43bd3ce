"""Regular expressions of strangers over names of modules, in bounded time.

adapter_config.json may hold regular expressions. Python's `re` tries them out path by path, and a short one can
take it years (`(a|a)*b`). Here a pattern maps the *set* of places where a match may stand to the set where it may
end, so that no path is walked twice (Thompson 1968); what is left is counted and limited. The syntax is that of
`re` without what reaches beyond such sets: back references, look-around, flags, possessive quantifiers. Whether a
whole name matches does not depend on greed, so `*?` means `*`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import NoReturn

MAX_LENGTH = 4096
"""Characters of one pattern."""

MAX_STEPS = 2_000_000
"""Steps of all patterns that share one `Budget`, which take about a second or two."""

_STEPS_TO_PARSE = 20
_MAX_NESTING = 20
_MAX_COUNT = 1000

_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^]\[\\])*\]")
_GROUP = re.compile(r"\((?:\?:|\?P<[A-Za-z_]\w*>|(?!\?))")
_PLAIN = re.compile(r"[\w.-]*")


class PatternError(ValueError):
    """The pattern is not in the syntax, or too costly."""


class Budget:
    """Steps that are left; `spend` raises `PatternError` when there are none."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise PatternError("it takes too long to match")


_Places = Set[int]
_Node = Callable[[str, _Places, Budget], _Places]


class Pattern:
    """A pattern that was understood. Raises `PatternError`."""

    def __init__(self, pattern: str, budget: Budget) -> None:
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"it has {len(pattern)} characters; at most {MAX_LENGTH}")
        # Without quantifier and choice a dot is all there is; such patterns are by far the most.
        self._word = pattern if _PLAIN.fullmatch(pattern) else None
        self._node: _Node | None = None
        if self._word is None:
            budget.spend(_STEPS_TO_PARSE * len(pattern))
            self._node = _Parser(pattern).parse()

    def matches(self, name: str, budget: Budget) -> bool:
        """Whether all of `name` matches, as `re.fullmatch`. Raises `PatternError`."""
        return self._matches(name, {0}, budget)

    def matches_end(self, name: str, budget: Budget) -> bool:
        """Whether `name`, or what follows one of its dots, matches. Raises `PatternError`."""
        return self._matches(name, {0} | {i + 1 for i, sign in enumerate(name) if sign == "."}, budget)

    def _matches(self, name: str, starts: _Places, budget: Budget) -> bool:
        if self._node is not None:
            return len(name) in self._node(name, starts, budget)
        budget.spend(1)
        word = self._word or ""
        start = len(name) - len(word)
        return start in starts and all(
            sign in (".", found) for sign, found in zip(word, name[start:], strict=True)
        )


class _Parser:
    """Recursive descent; each method returns the node of what it consumed."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._place = 0
        self._nesting = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._place < len(self._pattern):
            self._fail("a ) without (")
        return node

    def _fail(self, what: str) -> NoReturn:
        raise PatternError(f"{what} at character {self._place + 1}")

    def _at(self, sign: str) -> bool:
        return self._pattern.startswith(sign, self._place)

    def _choice(self) -> _Node:
        branches = [self._sequence()]
        while self._at("|"):
            self._place += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        word = ""
        while self._place < len(self._pattern) and not self._at("|") and not self._at(")"):
            literal, node = self._atom()
            counts = self._counts()
            if literal and counts is None:
                word += literal
                continue
            if word:
                nodes.append(_word(word))
                word = ""
            nodes.append(node if counts is None else _repeat(node, *counts))
        if word:
            nodes.append(_word(word))
        return nodes[0] if len(nodes) == 1 else _one_after_the_other(nodes)

    def _atom(self) -> tuple[str, _Node]:
        """The next atom; its character first where it is a literal one, else ""."""
        sign = self._pattern[self._place]
        if sign == "(":
            return "", self._group()
        if sign == "[":
            found = _CLASS.match(self._pattern, self._place)
            if found is None:
                self._fail("a character class that is not understood")
            self._place = found.end()
            return "", self._one_of(found[0])
        if sign in "*+?{":
            self._fail("a quantifier of nothing (a brace of its own is written \\{)")
        if sign == "\\":
            return self._escape()
        self._place += 1
        if sign == ".":
            return "", self._one_of(".")
        if sign in "^$":
            return "", _edge(at_start=sign == "^")
        return sign, _word(sign)

    def _group(self) -> _Node:
        opened = _GROUP.match(self._pattern, self._place)
        self._nesting += 1
        if opened is None or self._nesting > _MAX_NESTING:
            self._fail(f"a group of a kind that is not offered, or nested above {_MAX_NESTING} deep,")
        self._place = opened.end()
        node = self._choice()
        if not self._at(")"):
            self._fail("a ( without )")
        self._place += 1
        self._nesting -= 1
        return node

    def _escape(self) -> tuple[str, _Node]:
        sign = self._pattern[self._place + 1 : self._place + 2]
        if sign and sign in "dDwWsS":
            self._place += 2
            return "", self._one_of("\\" + sign)
        if sign and sign in "bB":
            self._place += 2
            return "", _word_border(wanted=sign == "b")
        if not sign or (sign.isalnum() and sign.isascii()):
            self._fail(f"the escape {sign!a} behind a backslash")
        self._place += 2
        return sign, _word(sign)

    def _one_of(self, text: str) -> _Node:
        try:
            return _character(re.compile(text))
        except re.error as error:
            raise PatternError(f"{text[:80]!a}: {error.msg}") from None

    def _counts(self) -> tuple[int, int | None] | None:
        """The quantifier that follows, as (least, most)."""
        found = _QUANTIFIER.match(self._pattern, self._place)
        if found is None:
            return None
        if found[0] == "{}" or len(found[0]) > 12:
            self._fail("a quantifier that is not understood")
        self._place = found.end()
        if self._at("?"):
            self._place += 1
        elif self._at("+"):
            self._fail("a possessive quantifier")
        if _QUANTIFIER.match(self._pattern, self._place):
            self._fail("a quantifier of a quantifier")
        if found[0] in ("*", "+", "?"):
            return (1 if found[0] == "+" else 0), (1 if found[0] == "?" else None)
        least = int(found[1] or 0)
        most = least if not found[2] else (int(found[3]) if found[3] else None)
        if max(least, most or 0) > _MAX_COUNT or (most is not None and most < least):
            self._fail(f"a count above {_MAX_COUNT} or that falls")
        return least, most


def _word(word: str) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        budget.spend(1 + len(starts))
        return {start + len(word) for start in starts if text.startswith(word, start)}

    return ends


def _character(one: re.Pattern[str]) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        budget.spend(1 + len(starts))
        return {start + 1 for start in starts if one.match(text, start)}

    return ends


def _edge(*, at_start: bool) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        budget.spend(1)
        return starts & {0 if at_start else len(text)}

    return ends


def _word_border(*, wanted: bool) -> _Node:
    border = re.compile(r"\b")

    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        budget.spend(1 + len(starts))
        return {start for start in starts if (border.match(text, start) is not None) == wanted}

    return ends


def _any_of(branches: list[_Node]) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        found: set[int] = set()
        for branch in branches:
            found |= branch(text, starts, budget)
        return found

    return ends


def _one_after_the_other(nodes: list[_Node]) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        for node in nodes:
            if not starts:
                break
            starts = node(text, starts, budget)
        return starts

    return ends


def _repeat(node: _Node, least: int, most: int | None) -> _Node:
    def ends(text: str, starts: _Places, budget: Budget) -> _Places:
        for _ in range(least):
            budget.spend(1)
            following = node(text, starts, budget)
            if following == starts:
                break
            starts = following
        reached, frontier, rounds = set(starts), starts, 0
        while frontier and (most is None or rounds < most - least):
            frontier = node(text, frontier, budget) - reached
            reached |= frontier
            rounds += 1
        return reached

    return ends
