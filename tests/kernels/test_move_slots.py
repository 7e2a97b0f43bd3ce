"""The accepted path of a token tree, moved to its final slots, is the KV of plain decoding: always `==`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    NATIVE,
    REFERENCE,
    Answer,
    Numerics,
    Run,
    answers,
    ask,
    each_numerics,
    make_batch,
    make_executor,
    small_config,
    step,
    tree_batch,
)
from tokenloom.clock import VirtualClock
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.kernels.native import extension
from tokenloom.runtime.local import LocalExecutor
from tokenloom.runtime.null import NullExecutor
from tokenloom.runtime.simulated import SimulatedExecutor

ISAS = [] if extension.missing() else extension.isas()
EVERY = (*REFERENCE, *(replace(numerics, isa=isa) for numerics in NATIVE for isa in ISAS))

# (token, parent): -1 hangs below the root. The first path is not the one that is taken.
NODES = [(5, -1), (6, 0), (7, 1), (8, -1), (9, 3), (10, 3), (11, 2), (12, 5), (13, 7), (14, 8), (15, 4)]
PATHS = [[3, 5, 7, 8, 9], [3, 4, 10], [0, 1, 2, 6], [3], []]
TEXT = list(range(40, 69))
AFTER = list(range(70, 95))
PAGES = [7, 3, 50, 9, 22]


def slot(place: int) -> int:
    """Of a token of the text whose pages are `PAGES`."""
    return PAGES[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE


def moves_of(path: list[int]) -> NDArray[np.int64]:
    root = len(TEXT) - 1
    pairs = [(slot(root + 1 + node), slot(root + 1 + depth)) for depth, node in enumerate(path)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def plain(runner: LocalExecutor, tokens: list[int], start: int) -> list[Answer]:
    """Rows from `start` on, the text in one piece on other pages."""
    run = Run(tokens, 0, len(tokens), range(60, 70))
    return answers(step(runner, make_batch([run], ask(run, 0, 4, {"temperature": 1.0}))))[start:]


def after_tree(runner: LocalExecutor, path: list[int], moves: NDArray[np.int64]) -> list[Answer]:
    """What follows once a tree was verified, and `path` of it was taken."""
    step(runner, make_batch([Run(TEXT, 0, len(TEXT) - 1, PAGES)]))
    root = len(TEXT) - 1
    nodes = [(token, parent + 1) for token, parent in NODES]
    step(runner, tree_batch(TEXT, PAGES, nodes, [slot(root + 1 + i) for i in range(len(NODES))], []))
    runner.move_slots(moves)
    tokens = TEXT + [NODES[node][0] for node in path] + AFTER
    rest = Run(tokens, len(tokens) - len(AFTER), len(tokens), PAGES)
    return answers(step(runner, make_batch([rest], ask(rest, 0, 4, {"temperature": 1.0}))))


@each_numerics(*EVERY)
def test_a_moved_path_is_the_kv_of_plain_decoding(numerics: Numerics) -> None:
    runner = make_executor(small_config(), numerics)
    for path in PATHS:
        tokens = TEXT + [NODES[node][0] for node in path] + AFTER
        expected = plain(runner, tokens, len(tokens) - len(AFTER))
        assert after_tree(runner, path, moves_of(path)) == expected
    none = np.zeros((0, 2), np.int64)
    path = PATHS[0]
    tokens = TEXT + [NODES[node][0] for node in path] + AFTER
    assert after_tree(runner, path, none) != plain(runner, tokens, len(tokens) - len(AFTER))


@each_numerics(Numerics("native", "bfloat16", "bfloat16"))
@pytest.mark.parametrize("threads", [1, 3])
def test_many_moves_on_several_threads(numerics: Numerics, threads: int) -> None:
    """More than one thread does alone; the same pages by chains of moves as by copies of pages."""
    runner = make_executor(small_config(), numerics, num_threads=threads)
    tokens = ((TEXT + AFTER) * 3)[:160]
    run = Run(tokens, 0, 160, range(10))
    step(runner, make_batch([run]))
    slots = np.arange(160)
    order = np.random.default_rng(0).permutation(160) + 30 * PAGE_SIZE
    there = np.concatenate([np.stack([slots, order], 1), np.stack([order, slots + 50 * PAGE_SIZE], 1)])
    runner.move_slots(np.ascontiguousarray(there, np.int64))
    rest = Run(tokens, 159, 160, range(50, 60), unstored=1)
    expected = plain(runner, tokens, 159)
    assert answers(step(runner, make_batch([rest], ask(rest, 0, 4, {"temperature": 1.0})))) == expected


@each_numerics(*REFERENCE, *NATIVE)
def test_moves_are_done_in_order(numerics: Numerics) -> None:
    """A source may be what an earlier move left there, and may be overwritten later."""
    runner = make_executor(small_config(), numerics)
    step(runner, make_batch([Run(TEXT, 0, 20, [1, 2])]))
    first, second = np.arange(16, 32), np.arange(32, 48)
    # Shifting page 1 by one slot towards its end smears its first slot over all.
    smear = np.stack([first[:-1], first[1:]], 1)
    runner.move_slots(np.ascontiguousarray(smear, np.int64))
    swap = np.concatenate([np.stack([first, second], 1), np.stack([second, first], 1)])
    runner.move_slots(np.ascontiguousarray(swap, np.int64))
    each = np.stack([np.full(16, 16), np.arange(80, 96)], 1)
    runner.move_slots(np.ascontiguousarray(each, np.int64))
    seen = []
    for pages in ([1, 40], [2, 41], [5, 42]):
        run = Run([1] * 17, 16, 17, pages)
        seen.append(answers(step(runner, make_batch([run], ask(run, 0, 0, {})))))
    assert seen[0] == seen[1] == seen[2]


@each_numerics(*REFERENCE, NATIVE[0], NATIVE[4])
@pytest.mark.parametrize("bad", [-1, 96 * PAGE_SIZE, 1 << 40, -(1 << 62)])
def test_slots_outside_the_pool_are_refused(numerics: Numerics, bad: int) -> None:
    runner = make_executor(small_config(), numerics)
    run = Run(TEXT, 0, 29, [1, 2])
    last = Run(TEXT, 28, 29, [1, 2], unstored=1)
    expected = answers(step(runner, make_batch([run], ask(run, 0, 0, {}))))[-1:]
    for pair in ((bad, 5), (5, bad)):
        # The first moves would be legal, and would break the text.
        moves = np.array([[300, 17], [301, 18], pair], np.int64)
        with pytest.raises(ValueError, match="moves"):
            runner.move_slots(moves)
    for shape in ((2,), (2, 3), (0,)):
        with pytest.raises(ValueError, match="moves"):
            runner.move_slots(np.zeros(shape, np.int64))
    assert answers(step(runner, make_batch([last], ask(last, 0, 0, {})))) == expected
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.move_slots(np.zeros((0, 2), np.int64))


def test_executors_without_kv_have_nothing_to_move() -> None:
    moves = np.array([[3, 4]], np.int64)
    NullExecutor().move_slots(moves)
    SimulatedExecutor(VirtualClock()).move_slots(moves)
