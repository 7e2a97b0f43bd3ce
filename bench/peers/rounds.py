"""Alternating rounds of cases, and what counts of them.

The standard library only: this also runs in the environments of other engines.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import machine

Figures = dict[str, float]
Case = Callable[[str], Figures]
"""Measures once, with prompts that the seed decides."""


class Disturbed(RuntimeError):
    """A measurement says nothing: something else must have used the machine."""


@dataclass(frozen=True)
class Referee:
    """How often to measure, and when something else on the machine makes a measurement void."""

    rounds: int
    max_other: float
    attempts: int
    patience_s: float

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Referee:
        return cls(spec["rounds"], spec["max_other"], spec["attempts"], spec["patience_s"])

    def measure(self, cases: Mapping[str, Case]) -> Rounds:
        """All cases in each round; another one begins each round."""
        found: list[dict[str, Any]] = []
        names = list(cases)
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                entry = self._once(name, cases[name], number + 1)
                note = "" if entry["quiet"] else f"  DISTURBED: others used {entry['other_cores']:.2f} cores"
                shown = ", ".join(f"{key} {value:.4g}" for key, value in entry["figures"].items())
                say(f"  round {number + 1}: {name}: {shown}{note}")
                found.append(entry)
        return Rounds(found)

    def _once(self, name: str, case: Case, number: int) -> dict[str, Any]:
        for attempt in range(self.attempts):
            if self.max_other < (os.cpu_count() or 1):
                machine.wait_until_quiet(self.max_other, self.patience_s)
            load = machine.OtherLoad()
            try:
                figures = case(f"{name}/{number}/{attempt}")
            except Disturbed as error:
                say(f"  round {number}: {name}: {error}")
                if attempt == self.attempts - 1:
                    raise
                continue
            other = round(load.cores(), 3)
            if other <= self.max_other:
                break
        quiet = other <= self.max_other
        return {
            "case": name,
            "round": number,
            "figures": figures,
            "other_cores": other,
            "quiet": quiet,
            "rejected": attempt + (not quiet),
        }


class Rounds:
    """Measurements of several cases, one of each in a round."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    def disturbed(self) -> list[str]:
        """The cases that were never undisturbed in a round."""
        return [f"{entry['case']} in round {entry['round']}" for entry in self.entries if not entry["quiet"]]

    def median(self, case: str, figure: str) -> float:
        """Over the undisturbed rounds; over all where there is none."""
        return statistics.median(entry["figures"][figure] for entry in self.quiet(case))

    def quiet(self, case: str) -> list[dict[str, Any]]:
        """The undisturbed measurements of `case`; all where there is none."""
        entries = [entry for entry in self.entries if entry["case"] == case]
        return [entry for entry in entries if entry["quiet"]] or entries

    def ratio(self, case: str, other: str, figure: str) -> float:
        """Median of the ratios of two cases of the same round, as the machine changes from minute to minute."""
        pairs = [
            (mine, theirs)
            for mine in self.entries
            for theirs in self.entries
            if mine["case"] == case and theirs["case"] == other and mine["round"] == theirs["round"]
        ]
        quiet = [pair for pair in pairs if pair[0]["quiet"] and pair[1]["quiet"]]
        return statistics.median(a["figures"][figure] / b["figures"][figure] for a, b in quiet or pairs)

    def summary(self) -> dict[str, Any]:
        """The median of every figure by case, what was rejected, and all that was measured."""
        cases = list(dict.fromkeys(entry["case"] for entry in self.entries))
        return {
            "medians": {
                case: {
                    figure: round(self.median(case, figure), 4)
                    for figure in next(e["figures"] for e in self.entries if e["case"] == case)
                }
                for case in cases
            },
            "rejected": sum(entry["rejected"] for entry in self.entries),
            "disturbed": self.disturbed(),
            "rounds": self.entries,
        }


def say(text: str) -> None:
    """Progress goes to standard error; standard output is for the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
