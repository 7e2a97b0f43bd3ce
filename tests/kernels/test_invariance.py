"""What a row gives depends on its own path only: not on its company, its chunks or its pages. Always `==`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import (
    NATIVE,
    Answer,
    Numerics,
    Run,
    answers,
    ask,
    each_numerics,
    make_batch,
    make_executor,
    random_weights,
    small_config,
    step,
)
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.kernels.native.weights import PackedTable
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0},
    {"temperature": 1.3, "min_p": 0.05},
]
LENGTHS = (150, 40, 3, 300)


@functools.cache
def executor(numerics: Numerics, heads: int = 4, kv_heads: int = 2, threads: int = 1) -> LocalExecutor:
    config = small_config(num_heads=heads, num_kv_heads=kv_heads)
    return make_executor(config, numerics, num_threads=threads)


@functools.cache
def texts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 100, length).tolist() for length in LENGTHS]


@functools.cache
def baseline(numerics: Numerics, heads: int = 4, kv_heads: int = 2) -> list[list[Answer]]:
    """Each text alone, in one chunk, on neighbouring pages."""
    found = []
    for i, tokens in enumerate(texts()):
        run = Run(tokens, 0, len(tokens), range(1, len(tokens) // PAGE_SIZE + 2))
        batch = make_batch([run], ask(run, 0, i, SAMPLING[i]))
        found.append(answers(step(executor(numerics, heads, kv_heads), batch)))
    return found


def replay(
    runner: LocalExecutor, chunks: list[list[int]], pages: list[int], order: list[int]
) -> list[list[Answer]]:
    """All texts together; text i advances by the lengths chunks[i], cycled, on pages dealt from `pages`."""
    tables = []
    for tokens in texts():
        count = len(tokens) // PAGE_SIZE + 1
        tables.append(pages[:count])
        pages = pages[count:]
    found: list[list[Answer]] = [[] for _ in texts()]
    done = [0] * len(texts())
    turn = 0
    while any(done[i] < len(tokens) for i, tokens in enumerate(texts())):
        runs, entries, owners, rows = [], [], [], 0
        for i in order:
            tokens = texts()[i]
            length = min(chunks[i][turn % len(chunks[i])], len(tokens) - done[i])
            if length == 0:
                continue
            run = Run(tokens, done[i], done[i] + length, tables[i])
            entries += ask(run, rows, i, SAMPLING[i])
            owners += [i] * length
            rows += length
            done[i] += length
            runs.append(run)
        turn += 1
        if runs:
            for owner, answer in zip(owners, answers(step(runner, make_batch(runs, entries))), strict=True):
                found[owner].append(answer)
    return found


@each_numerics()
def test_token_by_token(numerics: Numerics) -> None:
    runner = executor(numerics)
    pages = np.random.default_rng(1).permutation(np.arange(1, 96)).tolist()
    assert replay(runner, [[1]] * 4, pages, [3, 1, 0, 2]) == baseline(numerics)


@each_numerics(Numerics(), *NATIVE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1), (6, 1), (8, 1)])
def test_head_shapes(numerics: Numerics, heads: int, kv_heads: int) -> None:
    runner = executor(numerics, heads, kv_heads)
    found = replay(runner, [[7, 1, 30], [16, 1], [1], [129, 2]], list(range(95, 0, -1)), [0, 1, 2, 3])
    assert found == baseline(numerics, heads, kv_heads)


@each_numerics(Numerics(), *NATIVE)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(numerics: Numerics, threads: int) -> None:
    found = replay(executor(numerics, threads=threads), [[150]] * 4, list(range(1, 96)), [0, 1, 2, 3])
    assert found == baseline(numerics)


@each_numerics()
@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(
        st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(lambda c: any(c)), min_size=4, max_size=4
    ),
    pages=st.permutations(range(1, 96)),
    order=st.permutations(range(4)),
)
def test_any_schedule(
    numerics: Numerics, chunks: list[list[int]], pages: list[int], order: list[int]
) -> None:
    assert replay(executor(numerics), chunks, list(pages), list(order)) == baseline(numerics)


@each_numerics()
def test_a_full_prefix_hit_reads_its_own_key(numerics: Numerics) -> None:
    """The last row of a cached prompt is computed again without being stored."""
    runner = executor(numerics)
    tokens = texts()[1][:32]
    pages = [3, 4, 5]
    first = Run(tokens, 0, 32, pages)
    expected = answers(step(runner, make_batch([first], ask(first, 0, 0, SAMPLING[0]))))
    again = Run(tokens, 31, 32, pages, unstored=1)
    assert answers(step(runner, make_batch([again], ask(again, 0, 0, SAMPLING[0])))) == expected[-1:]


@each_numerics()
def test_page_copies_come_first(numerics: Numerics) -> None:
    runner = executor(numerics)
    tokens = texts()[1]
    run = Run(tokens, 0, 20, [3, 4])
    step(runner, make_batch([run]))
    forked = Run(tokens, 20, 40, [3, 9, 10])
    found = answers(step(runner, make_batch([forked], ask(forked, 0, 1, SAMPLING[1]), [(4, 9)])))
    assert found == baseline(numerics)[1][20:40]


@each_numerics()
def test_garbage_in_unseen_slots_does_not_matter(numerics: Numerics) -> None:
    """Stale keys of other requests are finite, as they are stored, but may be huge."""
    config = small_config()
    weights = random_weights(build(config))
    weights["model.embed_tokens.weight"][100] = 1e30
    runner = make_executor(config, numerics, weights=weights)
    for pages in (range(32), range(32, 64), range(64, 96)):
        step(runner, make_batch([Run([100] * 512, 0, 512, list(pages))]))
    found = replay(runner, [[7, 1, 30], [16, 1], [1], [129, 2]], list(range(1, 96)), [0, 1, 2, 3])
    assert found == baseline(numerics)


@each_numerics()
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_broken_request_does_not_poison_its_pages(numerics: Numerics, value: float) -> None:
    config = small_config()
    weights = random_weights(build(config))
    table = weights["model.embed_tokens.weight"]
    table[7] = value
    if numerics.weights:
        # A rounded table holds finite numbers only.
        weights["model.embed_tokens.weight"] = PackedTable(table)
    runner = make_executor(config, numerics, weights=weights)
    healthy = Run([1, 2, 3, 4, 5], 0, 5, [1])
    expected = answers(step(runner, make_batch([healthy], ask(healthy, 0, 0, SAMPLING[0]))))
    broken = Run([7] * 20, 0, 20, [1, 2])
    result = step(runner, make_batch([broken], ask(broken, 0, 0, SAMPLING[0])))
    assert (result.token_ids >= 0).all()
    assert answers(step(runner, make_batch([healthy], ask(healthy, 0, 0, SAMPLING[0])))) == expected
