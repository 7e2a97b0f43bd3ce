"""The loop of a draft in one native call is the loop in single steps, on every instruction set and number of threads;
what is not legal is refused before anything is computed."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    answers,
    ask,
    each_numerics,
    make_batch,
    make_executor,
    small_config,
    step,
)
from tests.kernels.test_adapters import CONFIG as ADAPTER_CONFIG
from tests.kernels.test_adapters import Host, make_blocks, make_embedding
from tokenloom.engine.batch import PAGE_SIZE, LogitEdits
from tokenloom.engine.proposer import Proposal
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.draft_work import DraftWork, scratch_pages
from tokenloom.runtime.local import LocalExecutor
from tokenloom.speculation.draft_loop import draft_by_levels

native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

CONFIG = small_config()
ROOT = Path(__file__).parents[3]
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.2, "top_k": 12, "top_p": 0.8, "seed": 1 << 63, "sample_index": 4},
    {"temperature": 0.6, "min_p": 0.02, "seed": 9},
]


def work_of(rng: random.Random, count: int, *, most: int = 4, adapters: Sequence[int] = (-1,)) -> DraftWork:
    """`count` sequences that lack a run of tokens, with scattered pages in a pool of 96 and trees up to `most` wide."""
    pages = list(range(96))
    rng.shuffle(pages)
    runs, entries, depths, widths, rows = [], [], [], [], 0
    for i in range(count):
        length = rng.choice([1, 2, 15, 16, 17, 30, 31, 32, 33]) if count < 9 else rng.choice([2, 15, 16])
        tokens = [rng.randrange(101) for _ in range(length)]
        own = [pages.pop() for _ in range(-(-length // PAGE_SIZE))]
        runs.append(Run(tokens, 0, length, own))
        rows += length
        entries.append(Entry(rows - 1, position=length, **SAMPLING[i % len(SAMPLING)]))
        depths.append(rng.randrange(0, 8 if count < 9 else 4))
        widths.append(rng.randint(1, most))
    needed = max(scratch_pages(len(run.tokens), d) for run, d in zip(runs, depths, strict=True))
    scratch = np.zeros((count, max(widths), needed), np.int32)
    for s, run in enumerate(runs):
        own = scratch_pages(len(run.tokens), depths[s])
        for beam in range(widths[s]):
            scratch[s, beam, :own] = [pages.pop() for _ in range(own)]
    batch = make_batch(runs, entries)
    batch.adapter_slots = np.array([adapters[s % len(adapters)] for s in range(count)], np.int32)
    return DraftWork(batch, np.array(depths, np.int32), np.array(widths, np.int32), scratch)


def same(found: Sequence[Proposal], expected: Sequence[Proposal]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.parents, one.ranks) == (other.tokens, other.parents, other.ranks)
        assert one.confidences == pytest.approx(other.confidences, rel=1e-12)


@each_numerics(*(replace(n, isa=isa) for n in NATIVE for isa in native.isas()))
def test_the_loop_in_single_steps(numerics: Numerics) -> None:
    """Several calls on one executor, whose arrays are used again."""
    rng = random.Random(numerics.name)
    executor = make_executor(CONFIG, numerics)
    for count in (3, 1, 5, 2):
        work = work_of(rng, count)
        same(executor.backend.draft(work), draft_by_levels(executor.backend, work))


@each_numerics(NATIVE[1])
@pytest.mark.parametrize("threads", [2, 3])
def test_more_rows_than_a_tile_of_the_head(numerics: Numerics, threads: int) -> None:
    rng = random.Random(threads)
    alone, executor = make_executor(CONFIG, numerics), make_executor(CONFIG, numerics, num_threads=threads)
    for _ in range(3):
        work = work_of(rng, 20, most=3)
        work.widths[:], work.depths[:] = 3, 2
        work.scratch = np.arange(36, 96, dtype=np.int32).reshape(20, 3, 1)
        tables = work.batch.page_tables
        # Committed pages below the scratch pages.
        moved = np.unique(tables)
        work.batch.page_tables = np.searchsorted(moved, tables).astype(np.int32)
        slots = work.batch.slots
        work.batch.slots = np.searchsorted(moved, slots // PAGE_SIZE) * PAGE_SIZE + slots % PAGE_SIZE
        work.check()
        found = executor.backend.draft(work)
        assert sum(len(proposal.tokens) for proposal in found) == 20 * 6
        same(found, draft_by_levels(alone.backend, work))


@each_numerics(*NATIVE[:3])
def test_adapters_of_each_sequence(numerics: Numerics) -> None:
    host = Host(numerics, threads=1)
    host.load(2, make_blocks(host.program, 12, (16, 5)), make_embedding(2, 3))
    host.load(0, make_blocks(host.program, 10, (1,)))
    backend = host.executor.backend
    rng = random.Random(5)
    for _ in range(3):
        work = work_of(rng, 4, adapters=(2, -1, 0))
        work.depths[:] = np.maximum(work.depths, 1)
        same(backend.draft(work), draft_by_levels(backend, work))
        bare = replace(work, batch=replace(work.batch, adapter_slots=np.full(4, -1, np.int32)))
        assert [p.tokens for p in backend.draft(bare)] != [p.tokens for p in backend.draft(work)]
    assert ADAPTER_CONFIG.vocab_size == 101


@each_numerics(*NATIVE)
def test_committed_pages_are_as_after_a_step(numerics: Numerics) -> None:
    """Nothing that a tree speculated stays: the texts go on as if there had been none."""
    rng = random.Random(8)
    executor, plain = make_executor(CONFIG, numerics), make_executor(CONFIG, numerics)
    for _ in range(4):
        work = work_of(rng, 3)
        executor.backend.draft(work)
        step(plain, work.batch)
        for s in range(3):
            length = work.context_of(s)
            own = [*work.batch.page_tables[s].tolist()[: length // PAGE_SIZE], 95, 94]
            copies = [(int(work.batch.page_tables[s, length // PAGE_SIZE]), 95)] if length % PAGE_SIZE else []
            run = Run([7] * (length + 5), length, length + 5, own)
            batch = make_batch([run], ask(run, 0, 3, {"temperature": 1.0}), copies)
            assert answers(step(executor, batch)) == answers(step(plain, batch))


@pytest.fixture(scope="module")
def runner() -> LocalExecutor:
    return make_executor(CONFIG, NATIVE[1], num_threads=2)


def small_work() -> DraftWork:
    runs = [Run(list(range(20)), 0, 20, [1, 2]), Run([5, 6, 7], 0, 3, [3])]
    entries = [Entry(19, position=20), Entry(22, position=3, temperature=1.0, seed=2)]
    scratch = np.arange(10, 18, dtype=np.int32).reshape(2, 2, 2)
    return DraftWork(
        make_batch(runs, entries), np.array([4, 3], np.int32), np.array([2, 1], np.int32), scratch
    )


def value_of(work: DraftWork, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), work)


def set_at(work: DraftWork, name: str, index: Any, value: Any) -> None:
    path, _, last = name.rpartition(".")
    array = value_of(work, name).copy()
    array[index] = value
    setattr(value_of(work, path) if path else work, last, array)


@pytest.mark.parametrize(
    ("name", "index", "value", "said"),
    [
        ("depths", 0, -1, "depths"), ("depths", 0, 2**31 - 1, "depths"), ("depths", 1, 1100, "depths"),
        ("depths", 1, 40, "scratch has 2 beams of 2 pages; sequence 1 has 1 of 3"),
        ("widths", 0, 0, "widths"), ("widths", 0, 9, "widths"), ("widths", 1, 3, "sequence 1 has 3"),
        ("scratch", (0, 1, 0), 96, "scratch names page 96"), ("scratch", (1, 0, 0), -1, "scratch names page -1"),
        ("batch.logit_rows.rows", 0, 18, "logit entries"), ("batch.logit_rows.targets", 1, 3, "logit entries"),
        ("batch.logical", 19, -5, "logical"), ("batch.logical", 19, 2**31 - 1, "logical"),
        ("batch.starts", 1, 2**31 - 1, "starts"), ("batch.starts", 1, -(2**31), "starts"),
        ("batch.starts", 2, 3, "starts|logit entries"), ("batch.token_ids", 0, 101, "token_ids"),
        ("batch.slots", 3, 96 * 16, "slots"), ("batch.page_tables", (0, 0), 96, "page_tables"),
        ("batch.adapter_slots", 0, 3, "adapter_slots"),
    ],
)  # fmt: skip
def test_work_that_is_not_legal_is_refused(
    runner: LocalExecutor, name: str, index: Any, value: int, said: str
) -> None:
    expected = runner.backend.draft(small_work())
    probe = make_batch([Run(list(range(20)), 19, 20, [1, 2], unstored=1)], [Entry(0, num_logprobs=3)])
    before = step(runner, probe)
    work = small_work()
    set_at(work, name, index, value)
    with pytest.raises(ValueError, match=said):
        runner.backend.draft(work)
    after = step(runner, probe)
    assert after.token_ids == before.token_ids
    assert after.top[0].logprobs.tobytes() == before.top[0].logprobs.tobytes()
    assert runner.backend.draft(small_work()) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"depths": np.array([2], np.int32)}, {"widths": np.array([2, 1, 1], np.int32)},
        {"scratch": np.zeros((2, 2), np.int32)}, {"scratch": np.zeros((1, 2, 2), np.int32)},
        {"scratch": np.zeros((2, 0, 2), np.int32)}, {"scratch": np.zeros((2, 2, 0), np.int32)},
    ],
)  # fmt: skip
def test_arrays_of_another_shape_are_refused(runner: LocalExecutor, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        runner.backend.draft(replace(small_work(), **change))


@pytest.mark.parametrize("name", ["depths", "widths", "scratch"])
def test_arrays_of_another_type_are_refused(runner: LocalExecutor, name: str) -> None:
    work = small_work()
    with pytest.raises(TypeError):
        runner.backend.draft(replace(work, **{name: getattr(work, name).astype(np.int64)}))


def test_entries_and_edits_that_do_not_fit_are_refused(runner: LocalExecutor) -> None:
    work = small_work()
    one = make_batch([Run([5, 6, 7], 0, 3, [3])], [Entry(2)])
    with pytest.raises(ValueError, match="logit entries"):
        runner.backend.draft(replace(work, batch=replace(work.batch, logit_rows=one.logit_rows)))
    outside = LogitEdits(allowed_ids=np.array([101], np.int32))
    entries = replace(work.batch.logit_rows, edits={1: outside})
    with pytest.raises(ValueError, match="allowed_ids"):
        runner.backend.draft(replace(work, batch=replace(work.batch, logit_rows=entries)))
    trained = replace(work.batch, work=np.array([3, 1], np.int8))
    with pytest.raises(UnsupportedFeature, match="training"):
        runner.backend.draft(replace(work, batch=trained))


def test_random_work_never_crashes(runner: LocalExecutor) -> None:
    """Arrays of random small and wild integers: an error or a result, and the executor goes on."""
    rng = np.random.default_rng(0)
    wild = np.array([-(2**31), -2, -1, 0, 1, 2, 8, 15, 16, 95, 96, 1023, 1024, 1536, 2**31 - 1])
    names = (
        "depths",
        "widths",
        "scratch",
        "batch.logical",
        "batch.starts",
        "batch.page_tables",
        "batch.positions",
    )
    served = 0
    for _ in range(2000):
        work = small_work()
        for name in rng.choice(names, 2):
            array = value_of(work, str(name))
            spots = np.unravel_index(rng.integers(0, array.size, rng.integers(1, 3)), array.shape)
            set_at(work, str(name), spots, rng.choice(wild, len(spots[0])))
        try:
            runner.backend.draft(work)
            served += 1
        except ValueError:
            pass
    assert 0 < served < 2000
    assert len(runner.backend.draft(small_work())[0].tokens) == 8


def test_a_closed_executor_drafts_no_more() -> None:
    executor = make_executor(CONFIG, NATIVE[1])
    executor.close()
    with pytest.raises(ValueError, match="closed"):
        executor.backend.draft(small_work())


_OUT_OF_MEMORY = """
import resource
import numpy as np
from dataclasses import replace
from tests.kernels.harness import NATIVE, Entry, Run, make_batch, make_executor, small_config
from tests.kernels.native.test_draft import small_work
from tokenloom.kernels.failure import StepFailed

runner = make_executor(small_config(), NATIVE[1])
first = runner.backend.draft(small_work())
large = small_work()
large.batch = make_batch([Run([1] * 1000, 0, 1000, range(20, 84)), Run([5], 0, 1, [3])],
                         [Entry(999, position=1000), Entry(1000, position=1)])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), hard))
try:
    runner.backend.draft(large)
    raise SystemExit("the draft found memory")
except StepFailed as failure:
    assert isinstance(failure.__cause__, MemoryError)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert runner.backend.draft(small_work()) == first
assert len(runner.backend.draft(large)[0].tokens) == 8
"""


def test_a_draft_that_finds_no_memory_can_be_repeated() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
