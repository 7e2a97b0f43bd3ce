"""The highest load at which enough requests meet their objectives: bracketing, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import sqrt

from tokenloom.bench.load.metrics import Report


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of a sweep: its load, the share of its requests that met all objectives, and its report."""

    load: float
    attainment: float
    report: Report


@dataclass(slots=True)
class Sweep:
    """What a sweep found. `best` is the highest load that was seen to hold, 0 if none did; `failing` the lowest
    that did not, infinite if all did. `converged` is whether they are within the tolerance, `interrupted`
    whether somebody stopped it."""

    probes: list[Probe] = field(default_factory=list)
    best: float = 0.0
    failing: float = float("inf")
    converged: bool = False
    interrupted: bool = False


async def find_load(
    measure: Callable[[float, int], Awaitable[Report]],
    *,
    start: float,
    attainment: float,
    tolerance: float = 0.05,
    max_probes: int = 12,
    on_probe: Callable[[Probe], None] = lambda probe: None,
) -> Sweep:
    """Look for the highest load whose attainment is at least `attainment`.

    `measure(load, number)` runs the probe with that number; one that has no attainment counts as none met. From
    `start` the load is doubled (or halved) until one probe holds and one does not; then the geometric middle is
    tried until failing <= best * (1 + tolerance), or `max_probes` were made. An interrupted probe ends the sweep
    and does not count. Attainment is taken to fall with the load, as in a queue it does; where it does not, the
    result is some load that holds with one above it that does not.
    """
    sweep = Sweep()
    load = start
    while len(sweep.probes) < max_probes:
        report = await measure(load, len(sweep.probes))
        if report.interrupted:
            sweep.interrupted = True
            break
        probe = Probe(load, report.attainment or 0.0, report)
        sweep.probes.append(probe)
        on_probe(probe)
        if probe.attainment >= attainment:
            sweep.best = load
        else:
            sweep.failing = load
        if sweep.best > 0 and sweep.failing <= sweep.best * (1 + tolerance):
            sweep.converged = True
            break
        if sweep.failing == float("inf"):
            load = sweep.best * 2
        elif not sweep.best:
            load = sweep.failing / 2
        else:
            load = sqrt(sweep.best * sweep.failing)
    return sweep
