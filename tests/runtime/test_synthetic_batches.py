"""Batches for measuring are legal, and touch the memory that they claim to touch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import Numerics, each_numerics, make_executor, small_config, step
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.runtime.synthetic_batches import page_writers, uniform_batch


@pytest.mark.parametrize("shape", [(1, 1, 0), (3, 1, 31), (2, 40, 7), (1, 512, 0), (4, 16, 16)])
def test_sequences_have_pages_of_their_own(shape: tuple[int, int, int]) -> None:
    sequences, rows, context = shape
    batch = uniform_batch(sequences, rows, context, vocab_size=7)
    batch.check()
    assert batch.num_rows == sequences * rows
    assert (batch.slots >= 0).all()
    assert 0 <= batch.token_ids.min() <= batch.token_ids.max() < 7
    assert len(np.unique(batch.page_tables)) == batch.page_tables.size
    assert batch.page_tables.shape == (sequences, -(-(rows + context) // PAGE_SIZE))
    assert batch.logit_rows.rows.tolist() == [rows * (i + 1) - 1 for i in range(sequences)]


@pytest.mark.parametrize("num_pages", [1, 2, 85])
def test_writers_fill_every_page(num_pages: int) -> None:
    first, second = page_writers(num_pages, vocab_size=7)
    for batch in (first, second):
        batch.check()
        assert batch.slots.tolist() == list(range(PAGE_SIZE))
        assert not batch.positions.any()
    assert first.page_copies.shape == (0, 2)
    assert second.page_copies.tolist() == [[0, page] for page in range(1, num_pages)]


@each_numerics(Numerics(), Numerics("native"), Numerics("native", "bfloat16", "int8"))
def test_executors_take_them(numerics: Numerics) -> None:
    runner = make_executor(small_config(vocab_size=5), numerics)
    for batch in page_writers(96, vocab_size=5):
        step(runner, batch)
    assert len(step(runner, uniform_batch(3, 20, 100, vocab_size=5)).token_ids) == 3
    runner.close()
