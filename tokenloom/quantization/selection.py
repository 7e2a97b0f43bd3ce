"""Which linears of a model are quantised, as the configurations of checkpoints say it: by names and patterns."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_HEADS: Final = ("lm_head", "embed_out")

PATTERN: Final = "re:"
_CLASS: Final = "Linear"
_MAX_LENGTH: Final = 256
_MAX_QUANTIFIERS: Final = 5
_MAX_GROUPS: Final = 4
_MAX_BRANCHES: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class NameSelection:
    """All modules but those whose names contain one of `skipped`; where `only` is not empty, just those whose
    names end with one of it. `head`: the output head too."""

    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    head: bool = False

    def selects(self, module: str) -> bool:
        if any(pattern in module for pattern in self.skipped):
            return False
        if module in _HEADS:
            return self.head
        return not self.only or any(f".{module}".endswith(f".{suffix}") for suffix in self.only)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a list of targets names: modules in full, patterns (which fit from the start of a name), and, with
    `linears`, every linear."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    linears: bool = False

    @classmethod
    def of(cls, targets: Iterable[str]) -> Targets:
        listed = tuple(targets)
        return cls(
            frozenset(target for target in listed if not target.startswith(PATTERN)),
            tuple(target.removeprefix(PATTERN) for target in listed if target.startswith(PATTERN)),
            _CLASS in listed,
        )

    def fit(self, module: str) -> bool:
        """Whether a pattern fits."""
        return any(_fits(pattern, module) for pattern in self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSelection:
    """Modules that `targets` name, without those that `ignored` names. `others` are the targets of other groups: a
    full name goes before a pattern, and that before "Linear"."""

    targets: Targets
    ignored: Targets = Targets()
    others: Targets = Targets()

    def selects(self, module: str) -> bool:
        if self.ignored.linears or module in self.ignored.names or self.ignored.fit(module):
            return False
        if module in self.targets.names:
            return True
        if module in self.others.names:
            return False
        return self.targets.fit(module) or (self.targets.linears and not self.others.fit(module))


Selection = NameSelection | TargetSelection


def pattern_problem(target: str) -> str | None:
    """What is wrong with a target that is a pattern; None for any other.

    A pattern comes from a stranger and is tried on every linear, so none may take long: repeated groups, and many
    repeats or branches, could take for ever.
    """
    if not target.startswith(PATTERN):
        return None
    pattern = target.removeprefix(PATTERN)
    if len(pattern) > _MAX_LENGTH:
        return f"at most {_MAX_LENGTH} characters"
    # What an escape or a set of characters stands for is one character.
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))
    # "?" behind "(" begins a kind of group; a name has fitted before ".*" at the end is tried.
    quantifiers = len(re.findall(r"(?<!\()[*+?{]", plain.removesuffix(".*")))
    if quantifiers > _MAX_QUANTIFIERS or re.search(r"\)[*+{?]", plain):
        return f"at most {_MAX_QUANTIFIERS} repeats, of single characters"
    if plain.count("(") > _MAX_GROUPS or plain.count("|") > _MAX_BRANCHES:
        return f"at most {_MAX_GROUPS} groups and {_MAX_BRANCHES} branches"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"a regular expression ({error})"
    return None


@functools.lru_cache(maxsize=1 << 16)
def _fits(pattern: str, module: str) -> bool:
    return re.match(pattern, module) is not None
