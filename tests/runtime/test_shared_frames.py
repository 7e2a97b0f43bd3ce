"""Two models in the same frames: each computes as if it were alone, whatever the other one left there."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import (
    NATIVE,
    Answer,
    Numerics,
    Run,
    answers,
    ask,
    each_numerics,
    make_batch,
    page_bytes_of,
    prepared,
    random_weights,
    rope_tables,
    small_config,
    step,
)
from tokenloom.errors import UnsupportedFeature
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

NUM_FRAMES = 8
TARGET = small_config()
DRAFT = small_config(num_layers=1, num_heads=3, num_kv_heads=1, head_dim=16, hidden_size=24)
KV_DTYPES = ("float32", "bfloat16", "int8")
TEXT = [int(t) for t in np.random.default_rng(2).integers(0, 101, 90)]


def executor(config: Any, numerics: Numerics, frame_bytes: int, **options: Any) -> LocalExecutor:
    program = build(config)
    weights = prepared(program, random_weights(program, seed=config.num_layers), numerics)
    fields: dict[str, Any] = {
        "num_frames": NUM_FRAMES,
        "frame_bytes": frame_bytes,
        "pages_per_frame": frame_bytes // page_bytes_of(program, numerics),
        "dtype": numerics.dtype,
        "kv_dtype": numerics.kv_dtype,
        "kernels": numerics.kernels,
    }
    return LocalExecutor(program, weights, rope_tables(config.head_dim), **fields | options)


@functools.cache
def frame_bytes_for(kernels: str) -> int:
    """Room for two pages of a target, and for some of a draft, in every format."""
    dtypes = KV_DTYPES if kernels == "native" else KV_DTYPES[:2]
    page = max(page_bytes_of(build(TARGET), Numerics(kernels, kv_dtype=kv_dtype)) for kv_dtype in dtypes)
    return 2 * page + 64


def pair(target: Numerics, draft: Numerics) -> tuple[LocalExecutor, LocalExecutor]:
    first = executor(TARGET, target, frame_bytes_for(target.kernels))
    return first, executor(DRAFT, draft, frame_bytes_for(target.kernels), frames_of=first)


def texts(runner: LocalExecutor, pages: list[int]) -> list[Answer]:
    """The text in pieces: each leaves the rest of its last page as it was."""
    found: list[Answer] = []
    for start, end in ((0, 3), (3, 20), (20, 41), (41, 42), (42, 90)):
        run = Run(TEXT, start, end, pages)
        found += answers(step(runner, make_batch([run], ask(run, 0, 1, {"temperature": 0.8}))))
    return found


def fill(runner: LocalExecutor) -> None:
    """Every page of the pool."""
    pages = runner._num_pages
    for first in range(0, pages, 64):
        own = list(range(first, min(first + 64, pages)))
        tokens = np.random.default_rng(first).integers(0, 101, 16 * len(own)).tolist()
        step(runner, make_batch([Run(tokens, 0, len(tokens), own)]))


def clear(runner: LocalExecutor) -> None:
    runner.backend.clear_kv_pages(np.arange(runner._num_pages, dtype=np.int32))


def numerics_of(kv_dtype: str) -> Numerics:
    return Numerics("native", "float32" if kv_dtype == "float32" else "bfloat16", kv_dtype)


@each_numerics(*(numerics_of(kv_dtype) for kv_dtype in KV_DTYPES))
def test_the_bits_of_each_are_those_it_has_alone(numerics: Numerics) -> None:
    poisoned = 0
    for other in (numerics_of(kv_dtype) for kv_dtype in KV_DTYPES):
        target, draft = pair(numerics, other)
        pages = list(range(10, 16))
        alone = texts(executor(TARGET, numerics, frame_bytes_for("native")), pages)
        assert texts(target, pages) == alone
        # A draft takes the frames, clears what it takes, and gives it back cleared.
        fill(target)
        clear(draft)
        expected = texts(executor(DRAFT, other, frame_bytes_for("native")), pages)
        assert texts(draft, pages) == expected
        fill(draft)
        poisoned += texts(target, pages) != alone
        clear(target)
        fill(draft)
        clear(draft)
        assert texts(target, pages) == alone
    # What clearing is for: keys of another format that are no finite numbers.
    assert poisoned >= {"float32": 1, "bfloat16": 2, "int8": 0}[numerics.kv_dtype]


@each_numerics(*NATIVE[:2])
def test_the_memory_is_one(numerics: Numerics) -> None:
    """A twin of the target goes on with the text whose keys the target stored, and outlives it."""
    frame_bytes = frame_bytes_for("native")
    target = executor(TARGET, numerics, frame_bytes)
    twin = executor(TARGET, numerics, frame_bytes, frames_of=target)
    pages = [3, 4, 5]
    step(target, make_batch([Run(TEXT, 0, 40, pages)]))
    run = Run(TEXT, 40, 42, pages)
    batch = make_batch([run], ask(run, 0, 0, {}))
    expected = answers(step(target, batch))
    target.close()
    assert answers(step(twin, batch)) == expected
    with pytest.raises(ValueError, match="closed"):
        executor(TARGET, numerics, frame_bytes, frames_of=target)


@each_numerics(Numerics(), Numerics(dtype="bfloat16", kv_dtype="bfloat16"))
def test_the_reference_has_the_page_ids(numerics: Numerics) -> None:
    target, draft = pair(numerics, Numerics())
    pages = list(range(10, 16))
    expected = texts(target, pages)
    assert draft._num_pages > target._num_pages
    fill(draft)
    assert texts(target, pages) == expected
    clear(draft)
    assert texts(target, pages) == expected


@each_numerics(Numerics(), *NATIVE[:1])
def test_frames_that_differ_are_refused(numerics: Numerics) -> None:
    frame_bytes = frame_bytes_for(numerics.kernels)
    target = executor(TARGET, numerics, frame_bytes)
    with pytest.raises(ValueError, match="number of frames"):
        executor(DRAFT, numerics, frame_bytes, frames_of=target, num_frames=7)
    with pytest.raises(ValueError, match="number of frames"):
        executor(DRAFT, numerics, frame_bytes + 64, frames_of=target)
    with pytest.raises((ValueError, UnsupportedFeature), match="fit"):
        executor(TARGET, numerics, frame_bytes, frames_of=target, pages_per_frame=9)


@each_numerics(*itertools.islice(NATIVE, 1))
def test_frames_of_other_kernels_are_refused(numerics: Numerics) -> None:
    target = executor(TARGET, numerics, frame_bytes_for("native"))
    with pytest.raises(ValueError, match="kernels"):
        executor(DRAFT, Numerics(), frame_bytes_for("native"), frames_of=target)


@each_numerics(Numerics(), *NATIVE[:1])
def test_pages_outside_the_pool_are_not_cleared(numerics: Numerics) -> None:
    target = executor(TARGET, numerics, frame_bytes_for(numerics.kernels))
    pages = [3, 4, 5]
    run = Run(TEXT, 0, 40, pages)
    expected = answers(step(target, make_batch([run], ask(run, 0, 0, {}))))
    for bad in (-1, target._num_pages):
        with pytest.raises(ValueError, match="pages"):
            target.backend.clear_kv_pages(np.array([3, bad], np.int32))
    last = Run(TEXT, 39, 40, pages, unstored=1)
    assert answers(step(target, make_batch([last], ask(last, 0, 0, {})))) == expected[-1:]
    target.close()
    with pytest.raises(ValueError, match="closed"):
        target.backend.clear_kv_pages(np.array([3], np.int32))


@each_numerics(Numerics("native", "bfloat16", "bfloat16"))
def test_profiles_of_a_draft_leave_no_trace(numerics: Numerics) -> None:
    pages = list(range(10, 16))
    alone = texts(executor(TARGET, numerics, frame_bytes_for("native")), pages)
    target, draft = pair(numerics, numerics_of("int8"))
    draft.profile(40, 200)
    target.profile(40, 100)
    assert texts(target, pages) == alone
    with pytest.raises(ValueError, match="only before the first"):
        draft.profile(1, 0)


@each_numerics(Numerics("native", "bfloat16", "bfloat16"))
def test_adapters_of_a_draft_leave_no_trace(numerics: Numerics) -> None:
    """An fp32 adapter of a draft that has fp32 keys: halves of its numbers would be read as keys of the target."""
    frame_bytes = frame_bytes_for("native") // 4096 * 4096
    pages = list(range(10, 16))
    alone = texts(executor(TARGET, numerics, frame_bytes), pages)
    target = executor(TARGET, numerics, frame_bytes)
    draft = executor(DRAFT, Numerics("native"), frame_bytes, frames_of=target)
    everywhere = np.arange(NUM_FRAMES * frame_bytes // 4096, dtype=np.int32)
    # 1.0 + 2**-7 - 2**-23: its lower half is 0xffff, no number in bf16.
    values = np.full(len(everywhere) * 1024, 0x3F80FFFF, np.uint32)
    draft.backend.write_pages(everywhere, 4096, values.view(np.uint8))
    assert texts(target, pages) != alone
    draft.backend.write_pages(everywhere, 4096, values.view(np.uint8))
    draft.backend.clear_pages(everywhere, 4096)
    assert texts(target, pages) == alone
