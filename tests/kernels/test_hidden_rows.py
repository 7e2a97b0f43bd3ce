"""Hidden rows of a step: what the head reads, for the rows that ask for it, with or without logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.harness import (
    NATIVE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    make_executor,
    small_config,
    step,
)
from tokenloom.engine.batch import StepResult, TokenBatch
from tokenloom.kernels.native import extension

CONFIG = small_config(num_layers=3)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 300).tolist()


def batch_of(hidden_rows: list[int], entries: list[Entry] | None = None) -> TokenBatch:
    """Rows 0-149 are a prompt, 150-169 another, 170 one more."""
    runs = [
        Run(TOKENS, 0, 150, range(1, 11)),
        Run(TOKENS[100:], 0, 20, [20, 21]),
        Run(TOKENS[50:], 0, 1, [30]),
    ]
    batch = replace(make_batch(runs, entries or []), hidden_rows=np.array(hidden_rows, np.int32))
    batch.check()
    return batch


def hidden(
    numerics: Numerics, rows: list[int], entries: list[Entry] | None = None, threads: int = 1
) -> StepResult:
    executor = make_executor(CONFIG, numerics, num_threads=threads)
    result = step(executor, batch_of(rows, entries))
    executor.close()
    assert result.hidden.dtype == np.float32
    assert result.hidden.shape == (len(rows), CONFIG.hidden_size)
    return result


def every_row(numerics: Numerics) -> NDArray[np.float32]:
    return hidden(numerics, list(range(171))).hidden


@each_numerics()
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_the_same_whatever_else_is_asked_for(numerics: Numerics, threads: int) -> None:
    whole = every_row(numerics)
    assert np.abs(whole).mean() > 0.1
    for rows in ([149], [0, 149, 150, 170], [3, 4, 5], list(range(150, 170))):
        assert (hidden(numerics, rows, threads=threads).hidden == whole[rows]).all()
    entries = [
        Entry(149, num_logprobs=2),
        Entry(169, temperature=1.0, seed=3),
        Entry(7, target=5, num_logprobs=0),
    ]
    mixed = hidden(numerics, [5, 149, 160], entries, threads)
    assert (mixed.hidden == whole[[5, 149, 160]]).all()
    plain = hidden(numerics, [], entries, threads)
    assert plain.hidden.shape == (0, CONFIG.hidden_size)
    assert (mixed.token_ids == plain.token_ids).all()
    assert mixed.logprobs.tobytes() == plain.logprobs.tobytes()


@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
def test_the_native_kernels_equal_the_reference() -> None:
    np.testing.assert_allclose(every_row(NATIVE[0]), every_row(Numerics()), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instruction_sets_give_the_same_bits(dtype: str) -> None:
    found = [every_row(Numerics("native", dtype, dtype, isa=isa)) for isa in extension.isas()]
    for other in found[1:]:
        assert (other == found[0]).all()


@each_numerics(Numerics(), NATIVE[1])
@pytest.mark.parametrize("rows", [[171], [-1], [5, 5], [9, 8]])
def test_rows_that_are_not_there_or_do_not_rise_are_refused(numerics: Numerics, rows: list[int]) -> None:
    executor = make_executor(CONFIG, numerics)
    batch = replace(batch_of([]), hidden_rows=np.array(rows, np.int32))
    with pytest.raises(ValueError, match="hidden_rows"):
        batch.check()
    with pytest.raises(ValueError, match="hidden_rows"):
        executor.submit(batch)
    assert len(step(executor, batch_of([3])).hidden) == 1
    executor.close()


@each_numerics(NATIVE[1])
def test_rows_of_another_type_are_refused(numerics: Numerics) -> None:
    executor = make_executor(CONFIG, numerics)
    for rows in (np.array([1.0]), np.array([1], np.int64), np.array([[1]], np.int32)):
        with pytest.raises((TypeError, ValueError)):
            executor.submit(replace(batch_of([]), hidden_rows=rows))
    executor.close()
