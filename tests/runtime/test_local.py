"""The executor's own duties: refusing what is malformed, surviving it, naming its numerics, profiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import (
    Answer,
    Entry,
    Numerics,
    Run,
    answers,
    ask,
    each_numerics,
    make_batch,
    make_executor,
    page_bytes_of,
    random_weights,
    rope_tables,
    small_config,
    step,
)
from tokenloom.engine.batch import Ticket, TokenBatch, Work
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.reference.backend import ReferenceBackend
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor


@pytest.fixture(scope="module")
def runner() -> LocalExecutor:
    return make_executor(small_config())


def poke(name: str, value: Any) -> Callable[[TokenBatch], None]:
    def change(batch: TokenBatch) -> None:
        target: Any = batch
        *path, last = name.split(".")
        for part in path:
            target = getattr(target, part)
        array = getattr(target, last).copy()
        array.reshape(-1)[-1] = value
        setattr(target, last, array)

    return change


MALFORMED = [
    ("token_ids", 101),
    ("token_ids", -1),
    ("positions", 5000),
    ("logical", 64),
    ("slots", 96 * 16),
    ("slots", -2),
    ("page_tables", 96),
    ("parents", 30),
    ("starts", 3),
    ("adapter_slots", 0),
    ("logit_rows.rows", 20),
    ("logit_rows.targets", 101),
]


@pytest.mark.parametrize(("name", "value"), MALFORMED)
def test_malformed_batches_are_refused(runner: LocalExecutor, name: str, value: int) -> None:
    tokens = list(range(20))
    run = Run(tokens, 0, 20, [1, 2])
    expected = answers(step(runner, make_batch([run], ask(run, 0, 0, {}))))
    batch = make_batch([Run(list(range(30, 50)), 0, 20, [1, 2])], [Entry(19)])
    poke(name, value)(batch)
    with pytest.raises(ValueError, match=name.split(".", maxsplit=1)[0]):
        runner.submit(batch)
    # Nothing was written: the first text goes on as if nothing had happened.
    again = Run(tokens, 19, 20, [1, 2], unstored=1)
    assert answers(step(runner, make_batch([again], ask(again, 0, 0, {})))) == expected[-1:]


def test_features_of_other_backends_are_refused_by_name(runner: LocalExecutor) -> None:
    batch = make_batch([Run([1, 2], 0, 2, [1])])
    poke("work", Work.TRAIN)(batch)
    with pytest.raises(UnsupportedFeature, match="training"):
        runner.submit(batch)


def test_an_error_while_computing_reaches_collect(runner: LocalExecutor) -> None:
    batch = make_batch([Run([1, 2], 0, 2, [1])], [Entry(1)])
    batch.logit_rows.temperatures = np.zeros(0, np.float32)
    ticket = runner.submit(batch)
    with pytest.raises(IndexError):
        runner.collect(ticket)
    assert len(step(runner, make_batch([Run([1, 2], 0, 2, [1])], [Entry(1)])).token_ids) == 1
    with pytest.raises(ValueError, match="ticket"):
        runner.collect(Ticket(batch))


def test_numerics_id_names_the_formats() -> None:
    ids = {
        make_executor(small_config(), Numerics(dtype=dtype, kv_dtype=kv_dtype)).numerics_id
        for dtype, kv_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    }
    assert len(ids) == 3
    assert make_executor(small_config()).numerics_id == make_executor(small_config()).numerics_id
    assert all(part.startswith("reference-1-") for part in ids)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float8", "float32"), ("float32", "int8")])
def test_unknown_formats_are_refused_by_name(dtype: str, kv_dtype: str) -> None:
    with pytest.raises(UnsupportedFeature, match="float8|int8"):
        make_executor(small_config(), Numerics(dtype=dtype, kv_dtype=kv_dtype))


def test_weights_must_have_the_shapes_of_the_program() -> None:
    program = build(small_config())
    weights = random_weights(program)
    weights["model.norm.weight"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        LocalExecutor(program, weights, rope_tables(24), num_frames=1, frame_bytes=1 << 20, pages_per_frame=1)


def test_profile_reads_pages_that_were_written() -> None:
    fresh = make_executor(small_config())
    backend = fresh.backend
    assert isinstance(backend, ReferenceBackend)
    assert backend._parts is not None
    pool = backend._parts[0]._pool
    page_bytes = page_bytes_of(build(small_config()), Numerics())

    def written() -> list[float]:
        """The share of each page that is not zero."""
        frames = pool._bytes.reshape(32, -1)[:, : 3 * page_bytes].copy()
        return (frames.view(np.float32).reshape(96, -1) != 0).mean(axis=1).tolist()

    assert fresh.profile(1, 0) > 0
    assert [share > 0.9 for share in written()] == [True] + [False] * 95
    # 540 tokens are 34 pages.
    assert fresh.profile(40, 500) > 0
    assert [share > 0.9 for share in written()] == [True] * 34 + [False] * 62
    fresh.close()


@each_numerics(Numerics(), Numerics("native"))
def test_profile_leaves_no_trace(numerics: Numerics) -> None:
    def texts(runner: LocalExecutor) -> list[Answer]:
        run = Run(list(range(20)), 0, 20, [1, 2])
        found = answers(step(runner, make_batch([run], ask(run, 0, 0, {}))))
        # A page of which only the first rows are written, after the profile had written all.
        last = Run(list(range(23)), 20, 23, [1, 2])
        return found + answers(step(runner, make_batch([last], ask(last, 0, 0, {}))))

    plain, profiled = make_executor(small_config(), numerics), make_executor(small_config(), numerics)
    profiled.profile(40, 500)
    assert texts(profiled) == texts(plain)


def test_profile_does_not_touch_pages_in_use(runner: LocalExecutor) -> None:
    step(runner, make_batch([Run([1, 2], 0, 2, [1])]))
    with pytest.raises(ValueError, match="only before the first"):
        runner.profile(1, 0)


@pytest.mark.parametrize(("rows", "context"), [(0, 5), (1, -1), (1000, 500), (1, 1024)])
def test_profile_stays_within_the_context(rows: int, context: int) -> None:
    with pytest.raises(InvalidParameter, match="from 1 to 1024"):
        make_executor(small_config()).profile(rows, context)


def test_profile_stays_within_the_pool() -> None:
    program = build(small_config())
    small = LocalExecutor(
        program,
        random_weights(program),
        rope_tables(24),
        num_frames=1,
        frame_bytes=3 * page_bytes_of(program, Numerics()),
        pages_per_frame=3,
    )
    assert small.profile(16, 32) > 0
    with pytest.raises(InvalidParameter, match="from 1 to 48"):
        small.profile(17, 32)


def test_no_entries(runner: LocalExecutor) -> None:
    result = step(runner, make_batch([Run([1, 2], 0, 2, [1])]))
    assert len(result.token_ids) == 0
    assert result.seconds > 0


def test_close() -> None:
    closing = make_executor(small_config(), num_threads=2)
    closing.close()
    with pytest.raises(ValueError, match="closed"):
        closing.submit(make_batch([Run([1], 0, 1, [1])]))
