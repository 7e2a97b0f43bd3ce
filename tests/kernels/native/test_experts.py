"""The native mixture of experts against the oracles of its parts, row by row."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

from tests.kernels.harness import Entry, Run, make_batch, rope_tables, step
from tokenloom.kernels import spec
from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.kernels.program import Experts, KVGeometry, Program
from tokenloom.quantization import round_to_nearest
from tokenloom.runtime.local import LocalExecutor

WIDTH, VOCAB = 40, 96
Float32 = NDArray[np.float32]


def build(count: int, top_k: int, hidden: int, epilogue: Any, normalized: bool) -> Program:
    """Experts over the embedding; the head is the identity for its first columns. Keys are there for form."""
    b = ProgramBuilder(KVGeometry(1, 1, 16), VOCAB)
    x, normed, out = (
        b.buffer("x", WIDTH),
        b.buffer("normed", WIDTH, "activation"),
        b.buffer("out", WIDTH, "activation"),
    )
    b.embed(b.weight("embed", VOCAB, WIDTH), x)
    b.cast(x, normed)
    qkv, q = b.buffer("qkv", 48), b.buffer("q", 16)
    b.linear(normed, b.weight("qkv", 48, WIDTH), qkv)
    b.rope_store(qkv, q, layer=0, num_heads=1, rotary_dim=16)
    b.linear(normed, b.weight("router", count, WIDTH), b.buffer("scores", count))
    b.route("scores", b.buffer("routes", 2 * top_k), top_k=top_k, normalized=normalized)
    b.experts(
        normed,
        "routes",
        [b.weight((f"gate{i}", f"up{i}"), 2 * hidden, WIDTH) for i in range(count)],
        [b.weight(f"down{i}", WIDTH, hidden) for i in range(count)],
        x,
        epilogue=epilogue,
    )
    b.cast(x, out)
    return b.finish(out, b.weight("head", VOCAB, WIDTH))


def weights_of(program: Program, dtype: str) -> dict[str, Float32]:
    rng = np.random.default_rng(1)
    made = {s.name: (rng.standard_normal(s.shape) * 0.3).astype(np.float32) for s in program.weights}
    if dtype == "bfloat16":
        made = {name: values.astype(ml_dtypes.bfloat16).astype(np.float32) for name, values in made.items()}
    return made | {"head": np.eye(VOCAB, WIDTH, dtype=np.float32)}


def executor_of(
    program: Program, weights: dict[str, Float32], dtype: str, rounding: str, isa: str = "", threads: int = 2
) -> LocalExecutor:
    rounded: Any = {
        name: rounding for op in program.ops if isinstance(op, Experts) for name in op.gate_up + op.down
    }
    packer = WeightPacker(program, dtype, extension.thread_pool(1), rounded if rounding else {})
    page = kv_page_bytes(program.kv, dtype, "native")
    return LocalExecutor(
        program,
        {s.name: packer.pack(s, [weights[s.name]]) for s in program.weights},
        rope_tables(16),
        num_frames=8,
        frame_bytes=-(-page // 64) * 64,
        pages_per_frame=1,
        dtype=dtype,
        kv_dtype=dtype,
        num_threads=threads,
        kernels="native",
        isa=isa,
    )


def product(weight: Float32, source: Float32, dtype: str, rounding: str) -> Float32:
    if rounding == "int8":
        eight = round_to_nearest.int8(weight, "w")
        return spec.linear_int8(*spec.quantize_row(source), eight.q, eight.scales)
    if rounding == "int4":
        four = round_to_nearest.int4(weight, name="w")
        return spec.linear_int4(*spec.quantize_row(source), four.q, four.scales, four.zeros, four.group)
    return spec.linear_fp32(source, weight) if dtype == "float32" else spec.linear_bf16(source, weight)


def expected_row(
    program: Program, weights: dict[str, Float32], token: int, dtype: str, rounding: str
) -> Float32:
    op = next(op for op in program.ops if isinstance(op, Experts))
    top_k = next(s.width for s in program.buffers if s.name == "routes") // 2
    normalized = next(op.normalized for op in program.ops if hasattr(op, "normalized"))
    rounded = spec.bf16 if dtype == "bfloat16" else (lambda values: values)
    x = weights["embed"][token]
    source = rounded(x)
    scores = product(weights["router"], source, dtype, "")
    shares, chosen = spec.route(scores, top_k, normalized)
    for share, expert in sorted(zip(shares, chosen, strict=True), key=lambda pair: pair[1]):
        both = product(weights[op.gate_up[expert]], source, dtype, rounding)
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        inner = rounded(spec.silu_mul(gate, up) if op.epilogue == "silu_mul" else spec.gelu(gate) * up)
        x = x + product(weights[op.down[expert]], inner, dtype, rounding) * share
    return rounded(x)


def rows_of(executor: LocalExecutor, tokens: list[int]) -> Float32:
    step(
        executor,
        make_batch([Run(tokens, 0, len(tokens), [3, 5, 1, 2, 4])], [Entry(i) for i in range(len(tokens))]),
    )
    return executor.backend.logits(np.arange(len(tokens), dtype=np.int32))[:, :WIDTH].copy()


CASES = [
    (5, 2, 24, "silu_mul", True), (20, 7, 10, "silu_mul", False), (3, 3, 33, "gelu_mul", False),
    (1, 1, 8, "silu_mul", True), (70, 17, 6, "gelu_mul", True), (1024, 64, 2, "silu_mul", False),
]  # fmt: skip


@pytest.mark.parametrize("isa", extension.isas())
@pytest.mark.parametrize("rounding", ["", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("count", "top_k", "hidden", "epilogue", "normalized"), CASES)
def test_rows_are_those_of_the_oracles(
    count: int, top_k: int, hidden: int, epilogue: str, normalized: bool, dtype: str, rounding: str, isa: str
) -> None:
    program = build(count, top_k, hidden, epilogue, normalized)
    weights = weights_of(program, dtype)
    executor = executor_of(program, weights, dtype, rounding, isa)
    tokens = np.random.default_rng(2).integers(0, VOCAB, 60 if count < 100 else 4).tolist()
    found = rows_of(executor, tokens)
    for token in sorted(set(tokens))[:: 6 if count < 100 else 1]:
        expected = expected_row(program, weights, token, dtype, rounding)
        for row in np.flatnonzero(np.array(tokens) == token):
            assert (found[row] == expected).all(), (token, row)


@pytest.mark.parametrize("rounding", ["", "int8", "int4"])
def test_a_row_does_not_see_its_neighbours(rounding: str) -> None:
    program = build(11, 3, 50, "silu_mul", True)
    weights = weights_of(program, "bfloat16")
    executor = executor_of(program, weights, "bfloat16", rounding)
    tokens = np.random.default_rng(3).integers(0, VOCAB, 64).tolist()
    whole = rows_of(executor, tokens)
    for size in (1, 2, 5, 33):
        for begin in range(0, 64, 17):
            part = tokens[begin : begin + size]
            assert (rows_of(executor, part) == whole[begin : begin + size]).all()
    single = executor_of(program, weights, "bfloat16", rounding, threads=1)
    assert (rows_of(single, tokens) == whole).all()


def test_broken_scores_choose_some_expert() -> None:
    """A row whose scores are not numbers spoils no other one."""
    program = build(6, 2, 8, "silu_mul", True)
    weights = weights_of(program, "float32")
    executor = executor_of(program, weights, "float32", "")
    whole = rows_of(executor, [1, 2, 3])
    weights["embed"][7], weights["embed"][8, 0], weights["embed"][9] = np.nan, np.inf, -np.inf
    broken = executor_of(program, weights, "float32", "")
    found = rows_of(broken, [1, 7, 2, 8, 9, 3])
    assert (found[[0, 2, 5]] == whole).all()
    assert not np.isfinite(found[[1, 3, 4]]).all(axis=1).any()


def test_equal_scores_go_to_the_lowest_numbers() -> None:
    scores = np.array([1, 3, 3, 0, 3], np.float32)
    assert spec.route(scores, 2, True)[1].tolist() == [1, 2]
    program = build(6, 3, 8, "silu_mul", True)
    weights = weights_of(program, "float32")
    weights["router"][:] = 0
    executor = executor_of(program, weights, "float32", "")
    assert (rows_of(executor, [4])[0] == expected_row(program, weights, 4, "float32", "")).all()


def test_native_refuses_what_the_records_cannot_say() -> None:
    native = extension.load()
    model = native.Model(extension.thread_pool(1), "", "float32")
    scores, routes, x = model.buffer(4, False), model.buffer(4, False), model.buffer(WIDTH, False)
    pool = extension.thread_pool(1)
    down = native.pack(pool, [np.ones((WIDTH, 8), np.float32)], ["float32"], "float32", False, 0)
    with pytest.raises(ValueError, match="no choice among 1"):
        model.experts(x, routes, x, [down], [down], "silu_mul")
    for top_k, target in ((0, routes), (5, routes), (3, routes), (2, scores)):
        with pytest.raises(ValueError, match="route"):
            model.route(scores, target, top_k, True)
