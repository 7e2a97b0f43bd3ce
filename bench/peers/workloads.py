"""The workloads: which requests are sent, and which figure is made of the times.

Every request is token ids in, a fixed number of token ids out (greedy, end of text ignored), and all requests
of one call are submitted at once, so that each engine is asked for the same work in its own words. The ids
are a function of (workload, round, attempt, call): all engines get the same ones, and no call of a process
repeats a prompt, so that a prefix cache helps only where the workload is about it.

    decodeN      N sequences, 128 tokens in, 128 out; tokens/s without the prefill (a call with one output
                 token is subtracted)
    prefillN     one prompt of N tokens, one token out; prompt tokens/s
    offlineN     N requests of log-normal lengths at once; output tokens/s
    prefixN      N requests with 1,024 tokens in common and 32 of their own, 32 out; seconds
    prefixwarmN  the same after one request with that prefix has been served; seconds
    startup      from the start of the process to the first token; seconds (the worker measures it)
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Callable
from typing import Any, Final, NamedTuple

DEFAULT: Final = (
    "startup",
    "decode1",
    "decode8",
    "decode32",
    "prefill2048",
    "offline64",
    "prefix32",
    "prefixwarm32",
)
LOWEST_ID: Final = 3
LONGEST: Final = 1024 + 512
"""Prompt and output tokens of the longest request of the offline mix."""
HIGHEST_ID: Final = 15_999
"""The ids that are a learnt token in each of the models S, M and L."""


class Request(NamedTuple):
    """One request: what goes in, and how many tokens must come out."""

    prompt: list[int]
    num_output: int


class Metric(NamedTuple):
    """What a workload's figure is called, and which direction is good."""

    key: str
    unit: str
    higher_is_better: bool


class Kind(NamedTuple):
    """A family of workloads; `repeats` is how often one round measures it."""

    metric: Metric
    repeats: int


KINDS: Final = {
    "decode": Kind(Metric("decode_tok_s", "tok/s", True), 3),
    "prefill": Kind(Metric("prefill_tok_s", "tok/s", True), 3),
    "offline": Kind(Metric("output_tok_s", "tok/s", True), 1),
    "prefix": Kind(Metric("seconds", "s", False), 1),
    "prefixwarm": Kind(Metric("seconds", "s", False), 1),
    "startup": Kind(Metric("seconds", "s", False), 1),
}


class Scale(NamedTuple):
    """Lengths of the workloads; the small ones are for trying out the harness."""

    decode_prompt: int = 128
    decode_output: int = 128
    divisor: int = 1
    """Of the long prompts and outputs."""


QUICK: Final = Scale(decode_prompt=32, decode_output=16, divisor=8)


def parse(name: str) -> tuple[str, int]:
    """The kind and the number of a workload; raises ValueError for a name that is none."""
    found = re.fullmatch(r"(decode|prefill|offline|prefixwarm|prefix)([1-9]\d*)|(startup)", name)
    if found is None:
        raise ValueError(f"no workload is called {name!r}")
    return (found[3], 0) if found[3] else (found[1], int(found[2]))


def metric_of(name: str) -> Metric:
    """The metric of a workload."""
    return KINDS[parse(name)[0]].metric


class Generator:
    """Makes the requests of one attempt at one workload, the same ones for every engine."""

    def __init__(self, seed: str, highest_id: int = HIGHEST_ID) -> None:
        self._seed = seed
        self._highest_id = highest_id
        self._calls = 0

    def _random(self) -> random.Random:
        self._calls += 1
        return random.Random(f"{self._seed}/{self._calls}")

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randint(LOWEST_ID, self._highest_id) for _ in range(count)]

    def equal(self, count: int, num_prompt: int, num_output: int) -> list[Request]:
        """`count` requests of equal lengths."""
        rng = self._random()
        return [Request(self._ids(rng, num_prompt), num_output) for _ in range(count)]

    def lognormal(self, count: int, divisor: int) -> list[Request]:
        """Requests of log-normal lengths; the lengths are always the same, only the contents differ."""
        lengths = random.Random(1234)
        sizes = [(_lognormal(lengths, 256, 16, 1024), _lognormal(lengths, 128, 8, 512)) for _ in range(count)]
        rng = self._random()
        return [
            Request(self._ids(rng, max(1, num_prompt // divisor)), max(1, num_output // divisor))
            for num_prompt, num_output in sizes
        ]

    def shared_prefix(self, count: int, divisor: int) -> list[Request]:
        """`count` prompts with the first 1,024 tokens in common."""
        rng = self._random()
        prefix = self._ids(rng, 1024 // divisor)
        return [Request(prefix + self._ids(rng, 32), 32 // min(divisor, 4)) for _ in range(count)]


def _lognormal(rng: random.Random, mean: float, low: int, high: int, sigma: float = 0.8) -> int:
    mu = math.log(mean) - sigma * sigma / 2
    return max(low, min(high, round(rng.lognormvariate(mu, sigma))))


Timed = Callable[[list[Request]], float]
"""Serves the requests and returns the seconds it took."""


def measure(name: str, make: Generator, timed: Timed, *, scale: Scale, repeats: int = 0) -> dict[str, Any]:
    """One measurement of a workload: its figure, the median over the repeats, and the times behind it."""
    kind, number = parse(name)
    repeats = repeats or (KINDS[kind].repeats if number < 32 or kind != "decode" else 2)
    match kind:
        case "decode":
            return _decode(number, make, timed, scale, repeats)
        case "prefill":
            num_prompt = max(1, number // scale.divisor)
            times = [timed(make.equal(1, num_prompt, 1)) for _ in range(repeats)]
            return {"prefill_tok_s": num_prompt / statistics.median(times), "times_s": times}
        case "offline":
            batches = [make.lognormal(number, scale.divisor) for _ in range(repeats)]
            times = [timed(batch) for batch in batches]
            num_output = sum(request.num_output for request in batches[0])
            num_prompt = sum(len(request.prompt) for request in batches[0])
            seconds = statistics.median(times)
            return {
                "output_tok_s": num_output / seconds,
                "total_tok_s": (num_prompt + num_output) / seconds,
                "times_s": times,
            }
        case "prefix":
            times = [timed(make.shared_prefix(number, scale.divisor)) for _ in range(repeats)]
            return {"seconds": statistics.median(times), "times_s": times}
        case "prefixwarm":
            times = []
            for _ in range(repeats):
                first, *others = make.shared_prefix(number + 1, scale.divisor)
                timed([first])
                times.append(timed(others))
            return {"seconds": statistics.median(times), "times_s": times}
    raise ValueError(f"{name} is not measured by sending requests")


def _decode(count: int, make: Generator, timed: Timed, scale: Scale, repeats: int) -> dict[str, Any]:
    """Decoding alone: the time of all tokens less the time of the first ones."""
    first: list[float] = []
    whole: list[float] = []
    for _ in range(repeats):
        first.append(timed(make.equal(count, scale.decode_prompt, 1)))
        whole.append(timed(make.equal(count, scale.decode_prompt, scale.decode_output)))
    seconds = statistics.median(whole) - statistics.median(first)
    if seconds <= 0:
        raise ValueError(f"{scale.decode_output} tokens took no longer than one: {whole}, {first}")
    return {
        "decode_tok_s": count * (scale.decode_output - 1) / seconds,
        "end_to_end_tok_s": count * scale.decode_output / statistics.median(whole),
        "times_s": whole,
        "first_token_times_s": first,
    }
