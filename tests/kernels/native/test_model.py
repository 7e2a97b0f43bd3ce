"""The native executor refuses what does not exist before it writes anything, and never crashes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    make_executor,
    random_weights,
    small_config,
    step,
)
from tokenloom.engine.batch import PAGE_SIZE, LogitEdits, LogitRows, TokenBatch
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.kernels.program import KVGeometry
from tokenloom.kernels.spec_sampling import MAX_VOCABULARY
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

BF16 = NATIVE[1]
ROOT = Path(__file__).parents[3]


def batch_of(edits: LogitEdits | None = None) -> TokenBatch:
    runs = [Run(list(range(40)), 0, 40, [1, 2, 3]), Run([5] * 20, 19, 20, [4, 5])]
    entries = [
        Entry(39, num_logprobs=3),
        Entry(40, temperature=1.0, top_k=5, edits=edits),
        Entry(39, target=7),
    ]
    return make_batch(runs, entries)


@pytest.fixture(scope="module")
def runner() -> LocalExecutor:
    return make_executor(small_config(), BF16, num_threads=2)


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("token_ids", 3, 101), ("token_ids", 0, -1), ("positions", 2, 1024), ("positions", 2, -1),
        ("logical", 5, 48), ("logical", 5, -1), ("slots", 1, 96 * 16), ("slots", 1, -2), ("parents", 4, 4),
        ("parents", 4, -2), ("starts", 0, 1), ("starts", 1, 0), ("starts", 1, 50), ("starts", 2, 7),
        ("page_tables", (0, 0), 96), ("page_tables", (1, 0), -1),
    ],
)  # fmt: skip
def test_hostile_indices_are_refused(runner: LocalExecutor, field: str, index: Any, value: int) -> None:
    batch = batch_of()
    array = getattr(batch, field).copy()
    array[index] = value
    setattr(batch, field, array)
    with pytest.raises(ValueError):
        runner.submit(batch)
    assert len(step(runner, batch_of()).token_ids) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 41),
        ("rows", -1),
        ("targets", 101),
        ("targets", -2),
        ("num_logprobs", 102),
        ("num_logprobs", -2),
    ],
)
def test_hostile_entries_are_refused(runner: LocalExecutor, field: str, value: int) -> None:
    batch = batch_of()
    getattr(batch.logit_rows, field)[1] = value
    with pytest.raises(ValueError):
        runner.submit(batch)


@pytest.mark.parametrize("field", [f.name for f in fields(LogitRows) if f.name != "edits"])
def test_entries_of_another_length_are_refused(runner: LocalExecutor, field: str) -> None:
    batch = batch_of()
    setattr(batch.logit_rows, field, getattr(batch.logit_rows, field)[:1])
    if field == "rows":
        # Fewer rows than everything else.
        with pytest.raises(ValueError):
            runner.submit(batch)
        return
    with pytest.raises((ValueError, IndexError)):
        runner.submit(batch)


@pytest.mark.parametrize(
    "edits",
    [
        LogitEdits(allowed_ids=np.array([101], np.int32)),
        LogitEdits(seen_ids=np.array([-1], np.int32), output_counts=np.array([1], np.int32)),
        LogitEdits(seen_ids=np.array([1], np.int32), output_counts=np.array([1, 2], np.int32)),
        LogitEdits(bias_ids=np.array([500], np.int32), bias=np.array([1.0], np.float32)),
        LogitEdits(bias_ids=np.array([5], np.int32), bias=np.zeros(0, np.float32)),
    ],
)
def test_hostile_edits_are_refused(runner: LocalExecutor, edits: LogitEdits) -> None:
    with pytest.raises(ValueError):
        runner.submit(batch_of(edits))


def test_random_batches_never_crash(runner: LocalExecutor) -> None:
    """Arrays of random small and wild integers: an error or a result, and the executor goes on."""
    rng = np.random.default_rng(0)
    wild = np.array([-(2**31), -2, -1, 0, 1, 15, 16, 100, 1023, 1535, 1536, 2**31 - 1])
    served = 0
    for _ in range(2000):
        batch = batch_of()
        for name in rng.choice(
            ["token_ids", "positions", "logical", "slots", "parents", "starts", "page_tables"], 2
        ):
            array = getattr(batch, name).copy()
            spots = rng.integers(0, array.size, rng.integers(1, 4))
            array.reshape(-1)[spots] = rng.choice(wild, len(spots))
            setattr(batch, name, array)
        try:
            runner.submit(batch)
            served += 1
        except (ValueError, UnsupportedFeature):
            pass
    assert 0 < served < 2000
    assert len(step(runner, batch_of()).token_ids) == 3


@each_numerics(*NATIVE)
def test_weights_of_another_shape_are_refused(numerics: Numerics) -> None:
    config = small_config()
    weights = random_weights(build(config))
    name = next(spec.name for spec in build(config).weights if len(spec.shape) == 2)
    weights[name] = weights[name][:, :-1]
    with pytest.raises((ValueError, UnsupportedFeature)):
        make_executor(config, numerics, weights=weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "float8"}, {"dim": 23}, {"dim": 0}, {"layers": 0}, {"heads": -1}, {"frames": 0},
        {"frame_bytes": 64}, {"pages": 0}, {"frame_bytes": 100_000 + 1},
    ],
)  # fmt: skip
def test_impossible_pools_are_refused(changes: dict[str, Any]) -> None:
    native = extension.load()
    model = native.Model(native.ThreadPool(1), "", "bfloat16")
    values = {
        "format": "bfloat16",
        "layers": 2,
        "heads": 2,
        "dim": 24,
        "frames": 3,
        "frame_bytes": 1 << 20,
        "pages": 1,
    }
    values |= changes
    with pytest.raises(ValueError):
        model.kv(*values.values())


def test_unknown_names_are_refused() -> None:
    native = extension.load()
    with pytest.raises(ValueError, match="avx9"):
        native.Model(native.ThreadPool(1), "avx9", "bfloat16")
    with pytest.raises(ValueError, match="float8"):
        native.Model(native.ThreadPool(1), "", "float8")
    with pytest.raises(ValueError, match="threads"):
        native.ThreadPool(0)


def test_a_vocabulary_beyond_the_sampler_is_refused() -> None:
    """Before anything is packed."""
    limit = extension.load().max_vocabulary
    assert limit == MAX_VOCABULARY
    with pytest.raises(UnsupportedFeature, match="vocabulary of 524,273 tokens"):
        WeightPacker(build(small_config(vocab_size=limit + 1)), "float32", extension.thread_pool(1), {})


@pytest.mark.parametrize(
    ("field", "dtype"), [("token_ids", np.int64), ("positions", np.float64), ("slots", np.float32)]
)
def test_arrays_of_another_type_are_refused(runner: LocalExecutor, field: str, dtype: Any) -> None:
    batch = batch_of()
    setattr(batch, field, getattr(batch, field).astype(dtype))
    with pytest.raises(TypeError):
        runner.submit(batch)


def test_a_refused_batch_leaves_the_last_one_as_it_was(runner: LocalExecutor) -> None:
    step(runner, batch_of())
    rows = np.array([39, 40], np.int32)
    before = runner.backend.logits(rows)
    refused = make_batch([Run(list(range(60)), 0, 60, [1, 2, 3, 4])], [Entry(59)])
    refused.parents = refused.parents.copy()
    refused.parents[5] = 2  # a parent must lie one position before
    with pytest.raises(ValueError, match="parent"):
        runner.submit(refused)
    assert (runner.backend.logits(rows) == before).all()
    with pytest.raises(ValueError, match="row 38"):
        runner.backend.logits(np.array([38], np.int32))
    with pytest.raises(ValueError, match="rows"):
        runner.backend.logits(np.array([41], np.int32))


_OUT_OF_MEMORY = """
import resource
from tests.kernels.harness import NATIVE, Entry, Run, make_batch, make_executor, small_config, step

runner = make_executor(small_config(), NATIVE[1])
small = lambda: make_batch([Run([5] * 20, 0, 20, [4, 5])], [Entry(19)])
large = make_batch([Run([1] * 1000, 0, 1000, range(1, 64))], [Entry(999)])
first = step(runner, small()).token_ids
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), hard))
try:
    step(runner, large)
    raise SystemExit("the step found memory")
except MemoryError:
    pass
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert (step(runner, small()).token_ids == first).all()
step(runner, large)
"""


def test_a_step_that_finds_no_memory_can_be_repeated() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr


def test_threads_that_cannot_be_started() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    pool = "from tokenloom.kernels.native import extension\nextension.load().ThreadPool(1000)"
    found = subprocess.run(
        [sys.executable, "-c", limit + pool], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 1
    assert "of 1000 threads started" in found.stderr


@pytest.mark.parametrize("dim", [24, 64, 80])
def test_page_bytes_agree(dim: int) -> None:
    """The plan of memory and the kernels lay out the same pages."""
    native = extension.load()
    for kv_dtype in ("float32", "bfloat16", "int8"):
        planned = kv_page_bytes(KVGeometry(3, 2, dim), kv_dtype, "native", PAGE_SIZE)
        assert planned == native.kv_page_bytes(kv_dtype, 3, 2, dim)
