"""Copies of activations in another order: the record, and linears whose columns lie in that order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import (
    NATIVE,
    REFERENCE,
    Entry,
    Numerics,
    Run,
    each_numerics,
    make_batch,
    page_bytes_of,
    prepared,
    random_weights,
    rope_tables,
    small_config,
    step,
)
from tokenloom.kernels.native import extension
from tokenloom.kernels.program import BufferSpec, Gather, Linear, Op, Program, WeightSpec
from tokenloom.kernels.program_check import check_program
from tokenloom.models.llama import build
from tokenloom.runtime.local import LocalExecutor

CONFIG = small_config()
LENGTH = 50
TOKENS = np.random.default_rng(2).integers(0, 100, LENGTH).tolist()


def gathered(program: Program) -> Program:
    """`program` with a gather before each linear and before the head."""
    widths = {spec.name: spec.width for spec in program.buffers}
    orders = {
        spec.name: WeightSpec(f"{spec.name}:order", spec.shape[1:], ("order",), integers=True)
        for spec in program.weights
        if spec.name in {op.weight for op in program.ops if isinstance(op, Linear)} | {program.head.weight}
    }
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, Linear):
            ops.append(Gather(op.source, orders[op.weight].name, f"g{widths[op.source]}"))
            op = replace(op, source=ops[-1].out)
        ops.append(op)
    head = program.head
    ops.append(Gather(head.source, orders[head.weight].name, "head"))
    outs = {op.out: op.source for op in ops if isinstance(op, Gather)}
    buffers = {out: BufferSpec(out, widths[source], "activation") for out, source in outs.items()}
    weights = [
        replace(s, input_order=orders[s.name].name) if s.name in orders else s for s in program.weights
    ]
    result = replace(
        program,
        ops=tuple(ops),
        head=replace(head, source="head"),
        buffers=(*program.buffers, *buffers.values()),
        weights=(*weights, *orders.values()),
    )
    check_program(result)
    return result


def ordered_weights(program: Program, weights: dict[str, Any]) -> dict[str, Any]:
    """`weights` with the columns of each linear in a random order, and these orders."""
    rng = np.random.default_rng(9)
    found = dict(weights)
    for spec in program.weights:
        if spec.input_order is not None:
            order = rng.permutation(spec.shape[1]).astype(np.int32)
            found[spec.input_order] = order
            found[spec.name] = np.ascontiguousarray(weights[spec.name][:, order])
    return found


def logits(
    program: Program,
    weights: dict[str, Any],
    numerics: Numerics,
    threads: int = 1,
    chunks: tuple[int, ...] = (LENGTH,),
) -> np.ndarray:
    """Of each token of one text, which goes through in `chunks`."""
    packed = prepared(program, weights, numerics)
    executor = LocalExecutor(
        program,
        packed,
        rope_tables(CONFIG.head_dim),
        num_frames=8,
        frame_bytes=-(-page_bytes_of(program, numerics) // 64) * 64,
        pages_per_frame=1,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=threads,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )
    found, start = [], 0
    for chunk in chunks:
        rows = range(chunk)
        step(
            executor,
            make_batch([Run(TOKENS, start, start + chunk, range(1, 6))], [Entry(row) for row in rows]),
        )
        found.append(executor.backend.logits(np.arange(chunk, dtype=np.int32)))
        start += chunk
    executor.close()
    assert start == LENGTH
    return np.concatenate(found)


PLAIN = build(CONFIG)
GATHERED = gathered(PLAIN)


@each_numerics()
def test_orders_change_only_the_order_of_sums(numerics: Numerics) -> None:
    weights = random_weights(PLAIN)
    if numerics.weights == "int4":
        pytest.skip("another order has other groups")
    expected = logits(PLAIN, weights, numerics)
    found = logits(GATHERED, ordered_weights(GATHERED, weights), numerics)
    if numerics.weights == "int8":
        # Sums of integers are exact, so that their order is nothing.
        assert (found == expected).all()
    else:
        narrow = numerics.dtype == "bfloat16" or numerics.kv_dtype == "int8"
        assert np.abs(found - expected).max() < (0.1 if narrow else 1e-4) * np.abs(expected).max()


@each_numerics(*REFERENCE, *NATIVE)
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (7, 1, 30, 12)])
def test_chunks_and_threads_change_nothing(numerics: Numerics, chunks: tuple[int, ...]) -> None:
    weights = ordered_weights(GATHERED, random_weights(PLAIN))
    expected = logits(GATHERED, weights, numerics)
    assert (logits(GATHERED, weights, numerics, 3, chunks) == expected).all()


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize("weights", ["", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instruction_sets_change_nothing(dtype: str, weights: str) -> None:
    ordered = ordered_weights(GATHERED, random_weights(PLAIN))
    isas = extension.load().isas()
    found = [logits(GATHERED, ordered, Numerics("native", dtype, dtype, weights, isa)) for isa in isas]
    assert all((one == found[0]).all() for one in found)
    assert len(found) == len(isas) > 0


def test_identity_is_a_copy() -> None:
    weights = random_weights(PLAIN)
    orders = {s.name: np.arange(s.shape[0], dtype=np.int32) for s in GATHERED.weights if s.integers}
    for numerics in (REFERENCE[0], *(NATIVE if extension.missing() is None else ())):
        assert (logits(GATHERED, weights | orders, numerics) == logits(PLAIN, weights, numerics)).all()


BAD_ORDERS = [
    np.arange(40, dtype=np.int64),
    np.arange(40, dtype=np.float32),
    np.arange(1, 41, dtype=np.int32),
    np.arange(-1, 39, dtype=np.int32),
]


@each_numerics(REFERENCE[0], NATIVE[0])
@pytest.mark.parametrize("order", BAD_ORDERS)
def test_weights_that_are_no_order(order: np.ndarray, numerics: Numerics) -> None:
    weights = ordered_weights(GATHERED, random_weights(PLAIN))
    weights["lm_head.weight:order"] = order
    with pytest.raises(ValueError, match="order|gather"):
        logits(GATHERED, weights, numerics)


def change(kind: type[Any], **fields: Any) -> Callable[[Program], Program]:
    """Change the first op of a kind."""

    def apply(program: Program) -> Program:
        ops: list[Op] = list(program.ops)
        index = next(i for i, op in enumerate(ops) if isinstance(op, kind))
        ops[index] = replace(ops[index], **fields)
        return replace(program, ops=tuple(ops))

    return apply


def change_weights(name: str, **fields: Any) -> Callable[[Program], Program]:
    return lambda program: replace(
        program, weights=tuple(replace(s, **fields) if name in s.name else s for s in program.weights)
    )


ILLEGAL = [
    (change(Gather, source="x"), "two activations"),
    (change(Gather, out="normed"), "two activations"),
    (change(Gather, out="x"), "two activations"),
    (change(Gather, source="g40"), "read before it is written"),
    (change(Gather, order="nothing"), "unknown weight"),
    (change(Gather, order="model.norm.weight"), "must be integers"),
    (change(Gather, order="model.layers.0.mlp.down_proj.weight:order"), "has shape"),
    (change(Linear, source="normed"), "another order"),
    (lambda p: replace(p, head=replace(p.head, source="normed")), "another order"),
    (change_weights("down_proj.weight", input_order=None), "another order"),
    (change_weights("layers.0.self_attn.o_proj.weight:order", integers=False), "must be integers"),
    (change_weights("model.norm.weight", integers=True), "must be floats"),
    (
        lambda p: replace(p, ops=tuple(op for op in p.ops if not isinstance(op, Gather))),
        "before it is written",
    ),
]


@pytest.mark.parametrize(("damage", "message"), ILLEGAL)
def test_illegal_programs(damage: Callable[[Program], Program], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_program(damage(GATHERED))


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize(
    "order",
    [
        np.arange(39, dtype=np.int32),
        np.arange(1, 41, dtype=np.int32),
        np.arange(-1, 39, dtype=np.int32),
        np.full(40, 1 << 30, np.int32),
        np.arange(40, dtype=np.int32)[None],
    ],
)
def test_the_kernels_refuse_orders_outside_of_a_row(order: np.ndarray) -> None:
    native = extension.load()
    model = native.Model(native.ThreadPool(1), "", "float32")
    first, second = model.buffer(40, True), model.buffer(40, True)
    with pytest.raises(ValueError, match="gather|one dimension"):
        model.gather(first, order, second)
    with pytest.raises(TypeError):
        model.gather(first, np.arange(40, dtype=np.float32), second)
    with pytest.raises(ValueError, match="gather"):
        model.gather(first, np.arange(40, dtype=np.int32), first)
    with pytest.raises(ValueError, match="gather"):
        model.gather(first, np.arange(40, dtype=np.int32), model.buffer(41, True))
