"""Attention of the reference against the oracle: windows, tiles, long contexts; and token trees."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    Entry,
    Run,
    answers,
    ask,
    logit_rows,
    make_batch,
    make_executor,
    small_config,
    step,
    tree_batch,
)
from tokenloom.engine.batch import PAGE_SIZE, TokenBatch, Work
from tokenloom.kernels import spec
from tokenloom.kernels.program import Attention, KVGeometry
from tokenloom.kernels.reference.attention import AttentionPlan, HeadShape, run_attention
from tokenloom.kernels.reference.kv_pool import KVPool

Float32 = NDArray[np.float32]


def attend(
    op: Attention, length: int, runs: list[tuple[int, int]], pages: list[int], pool: KVPool, queries: Float32
) -> Float32:
    """Rows of one text, in the given runs (one segment each); queries [length, width]."""
    parts = [Run(list(range(length)), start, end, pages) for start, end in runs]
    batch = make_batch(parts)
    plan = AttentionPlan(batch, HeadShape.of(op), op.window, pool)
    source = np.concatenate([queries[start:end] for start, end in runs])
    out = np.full_like(source, np.nan)
    with np.errstate(all="ignore"):
        for group in plan.groups:
            run_attention(op, group, pool, source, out)
    return out


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (3, 3), (5, 1)])
def test_equals_the_oracle(window: int | None, heads: int, kv_heads: int) -> None:
    dim, length = 12, 390
    rng = np.random.default_rng(heads)
    stored = rng.standard_normal((length, 2, kv_heads, dim)).astype(np.float32)
    queries = rng.standard_normal((length, heads * dim)).astype(np.float32) * 3
    pages = rng.permutation(30)[: length // PAGE_SIZE + 1].tolist()
    pool = KVPool(
        KVGeometry(2, kv_heads, dim), "float32", num_frames=30, frame_bytes=1 << 15, pages_per_frame=1
    )
    place = np.arange(length)
    frames, indices = pool.locate(np.array(pages)[place // PAGE_SIZE])
    pool.store(1, frames, indices, place % PAGE_SIZE, stored)
    op = Attention("q", "a", 1, heads, kv_heads, dim, 0.3, window)
    whole = attend(op, length, [(0, length)], pages, pool, queries)
    for row in (0, 1, 49, 127, 128, 255, 256, 389):
        first = 0 if window is None else max(row - window + 1, 0)
        for head in range(heads):
            columns = slice(head * dim, (head + 1) * dim)
            keys, values = stored[: row + 1, :, head * kv_heads // heads].swapaxes(0, 1)
            expected = spec.attention(queries[row, columns], keys, values, 0.3, first)
            assert whole[row, columns] == pytest.approx(expected, rel=1e-5, abs=4e-6)
    cut = attend(op, length, [(0, 3), (3, 300), (300, 389), (389, 390)], pages, pool, queries)
    assert (cut.view(np.uint32) == whole.view(np.uint32)).all()
    single = attend(op, length, [(row, row + 1) for row in range(100, 390, 7)], pages, pool, queries)
    assert (single.view(np.uint32) == whole[100:390:7].view(np.uint32)).all()


@pytest.mark.parametrize("length", [5, 120, 129, 200])
def test_each_path_of_a_tree_equals_the_plain_text(length: int) -> None:
    """Bit for bit, whatever stands in the scratch slots and in the other branches."""
    runner = make_executor(small_config())
    rng = np.random.default_rng(length)
    text = rng.integers(0, 101, length).tolist()
    nodes = [(int(rng.integers(101)), int(rng.integers(i + 1))) for i in range(20)]
    pages = list(range(1, 16))
    scratch = (rng.permutation(40 * PAGE_SIZE)[:20] + 40 * PAGE_SIZE).tolist()
    if length > 1:
        step(runner, make_batch([Run(text, 0, length - 1, pages)]))
    entries = []
    for row in range(21):
        entries += [Entry(row, target=0, num_logprobs=4), Entry(row, temperature=1.0, seed=3, position=row)]
    for entry in entries:
        entry.num_logprobs = max(entry.num_logprobs, 0)
    found = answers(step(runner, tree_batch(text, pages, nodes, scratch, entries)))
    for row in range(21):
        path, node = [], row
        while node > 0:
            token, node = nodes[node - 1]
            path.append(token)
        plain = text + path[::-1]
        run = Run(plain, 0, len(plain), range(20, 36))
        single = [
            Entry(len(plain) - 1, target=0, num_logprobs=4),
            Entry(len(plain) - 1, temperature=1.0, seed=3, position=row, num_logprobs=0),
        ]
        assert answers(step(runner, make_batch([run], single))) == [found[row]]


def test_a_tree_in_mixed_company() -> None:
    """Decode rows and prompt chunks beside a tree keep their bits."""
    runner = make_executor(small_config())
    tokens = list(range(50))
    run = Run(tokens, 0, 50, [1, 2, 3, 4])
    expected = answers(step(runner, make_batch([run], ask(run, 0, 0, {"temperature": 1.0}))))
    tree = tree_batch([5, 6, 7], [5], [(8, 0), (9, 0), (1, 2)], [6 * 16, 6 * 16 + 3, 7 * 16], [])
    step(runner, make_batch([Run([5, 6, 7], 0, 2, [5])]))
    plain = make_batch([run], ask(run, 4, 0, {"temperature": 1.0})[:0])
    mixed = TokenBatch(
        token_ids=np.concatenate([tree.token_ids, plain.token_ids]),
        positions=np.concatenate([tree.positions, plain.positions]),
        logical=np.concatenate([tree.logical, plain.logical]),
        slots=np.concatenate([tree.slots, plain.slots]),
        parents=np.concatenate([tree.parents, plain.parents]),
        starts=np.array([0, 4, 54], np.int32),
        context_lens=np.array([2, 0], np.int32),
        page_tables=np.array([[5, 0, 0, 0], [1, 2, 3, 4]], np.int32),
        adapter_slots=np.full(2, -1, np.int32),
        work=np.array([Work.VERIFY, Work.PREFILL], np.int8),
        logit_rows=logit_rows(ask(run, 4, 0, {"temperature": 1.0})),
        page_copies=np.zeros((0, 2), np.int32),
    )
    assert answers(step(runner, mixed)) == expected
