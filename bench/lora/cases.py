"""The measurements that every engine is asked for. The standard library only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from rounds import Case, Disturbed, Figures

Prompts = list[list[int]]
Choice = int | None
"""The number of an adapter, or None for the model itself."""

Serve = Callable[[Prompts, int, Sequence[Choice]], list[list[int]]]
"""Serves prompts, all submitted at once, greedily, without an end of text: (prompts, output tokens each, adapter
of each) -> output tokens of each."""

LOWEST_ID: Final = 3


class Shape(NamedTuple):
    """Sizes of the measurements."""

    requests: int = 32
    prompt: int = 128
    output: int = 128
    long_prompt: int = 2048
    highest_id: int = 15_999


QUICK: Final = Shape(requests=8, prompt=16, output=24, long_prompt=512, highest_id=3_999)


def shape_of(quick: bool) -> Shape:
    return QUICK if quick else Shape()


def random_prompts(seed: str, count: int, length: int, highest_id: int) -> Prompts:
    """Prompts that `seed` decides; no two of different seeds share a prefix worth caching."""
    rng = random.Random(seed)
    return [[rng.randint(LOWEST_ID, highest_id) for _ in range(length)] for _ in range(count)]


def timed(
    serve: Serve, prompts: Prompts, num_output: int, adapters: Sequence[Choice]
) -> tuple[float, Prompts]:
    """Seconds, and the tokens that came out. Raises RuntimeError if their number is wrong."""
    started = time.perf_counter()
    outputs = serve(prompts, num_output, adapters)
    seconds = time.perf_counter() - started
    if [len(output) for output in outputs] != [num_output] * len(prompts):
        raise RuntimeError(f"{[len(output) for output in outputs][:40]} tokens, not {num_output} each")
    return seconds, outputs


def decode(
    serve: Serve, shape: Shape, adapters: Sequence[Choice], keep: dict[str, list[int]] | None = None
) -> Case:
    """One request for each of `adapters` at once, when these are resident: tokens/s without the prefill (a call
    with one output token is subtracted), and of the whole call. First tokens by seed go to `keep`."""

    def run(seed: str) -> Figures:
        count = len(adapters)
        serve(random_prompts(f"{seed}/warm", count, 1, shape.highest_id), 1, adapters)
        prompts = random_prompts(f"{seed}/first", count, shape.prompt, shape.highest_id)
        first, _ = timed(serve, prompts, 1, adapters)
        # The same prompts for every engine and case of a round, so that their outputs can be compared.
        prompts = random_prompts(f"whole/{seed.split('/', 1)[1]}", count, shape.prompt, shape.highest_id)
        whole, outputs = timed(serve, prompts, shape.output, adapters)
        if keep is not None:
            keep[seed] = [output[0] for output in outputs]
        return rates(count, shape.output, first, whole)

    return run


def rates(count: int, num_output: int, first: float, whole: float) -> Figures:
    """Figures of `count` requests that took `whole` seconds, `first` of them with one output token."""
    if whole <= first:
        raise Disturbed(f"{num_output} tokens took {whole:.3f} s, one token {first:.3f} s")
    return {
        "decode_tok_s": count * (num_output - 1) / (whole - first),
        "end_to_end_tok_s": count * num_output / whole,
        "first_s": first,
        "whole_s": whole,
    }


def prefill(serve: Serve, shape: Shape, adapter: Choice, repeats: int = 3) -> Case:
    """One long prompt with one output token; tokens/s, the best of some."""

    def run(seed: str) -> Figures:
        serve(random_prompts(f"{seed}/warm", 1, 1, shape.highest_id), 1, [adapter])
        times = []
        for repeat in range(repeats):
            prompts = random_prompts(f"{seed}/{repeat}", 1, shape.long_prompt, shape.highest_id)
            times.append(timed(serve, prompts, 1, [adapter])[0])
        return {"prefill_tok_s": shape.long_prompt / min(times), "seconds": min(times)}

    return run
