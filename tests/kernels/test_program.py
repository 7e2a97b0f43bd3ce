"""Which programs are legal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.harness import small_config
from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.program import (
    Attention,
    BufferSpec,
    Cast,
    Embed,
    Experts,
    KVGeometry,
    Linear,
    Op,
    Program,
    RMSNorm,
    RopeStore,
    Route,
    WeightSpec,
)
from tokenloom.kernels.program_check import check_program
from tokenloom.models.config import ExpertsConfig
from tokenloom.models.llama import build


@pytest.fixture
def program() -> Program:
    return build(small_config(attention_bias=True))


def change(kind: type[Any], **fields: Any) -> Callable[[Program], Program]:
    """Change the first op of a kind."""

    def apply(program: Program) -> Program:
        ops: list[Op] = list(program.ops)
        index = next(i for i, op in enumerate(ops) if isinstance(op, kind))
        ops[index] = replace(ops[index], **fields)
        return replace(program, ops=tuple(ops))

    return apply


def drop(kind: type[Any]) -> Callable[[Program], Program]:
    def apply(program: Program) -> Program:
        index = next(i for i, op in enumerate(program.ops) if isinstance(op, kind))
        return replace(program, ops=program.ops[:index] + program.ops[index + 1 :])

    return apply


def after(kind: type[Any], op: Op) -> Callable[[Program], Program]:
    """Put `op` behind the first op of a kind."""

    def apply(program: Program) -> Program:
        index = next(i for i, found in enumerate(program.ops) if isinstance(found, kind))
        return replace(program, ops=(*program.ops[: index + 1], op, *program.ops[index + 1 :]))

    return apply


def reorder(name: str) -> Callable[[Program], Program]:
    """Say that the columns of a weight lie in an order."""

    def apply(program: Program) -> Program:
        specs = [
            replace(spec, input_order="order") if spec.name == name else spec for spec in program.weights
        ]
        return replace(program, weights=tuple(specs))

    return apply


ILLEGAL = [
    (drop(Embed), "read before it is written"),
    (drop(RopeStore), "before it is stored|before it is written"),
    (change(RMSNorm, weight="nothing"), "unknown weight"),
    (change(RMSNorm, out="nothing"), "unknown buffer"),
    (change(Linear, source="x"), "must be an activation"),
    (change(Linear, out="normed"), "reads and writes"),
    (change(Linear, out="x"), "wide"),
    (change(Linear, bias="model.norm.weight"), "is needed"),
    (change(Linear, epilogue="residual"), "before it is written"),
    (change(RopeStore, rotary_dim=7), "must be even"),
    (change(RopeStore, layer=5), "lies outside"),
    (change(RopeStore, head_dim=12), "other heads"),
    (change(RopeStore, layer=1), "before it is stored"),
    (change(Attention, window=0), "shows no key"),
    (change(Attention, num_heads=3), "cannot share"),
    (lambda p: replace(p, vocab_size=7), "is needed"),
    (lambda p: replace(p, kv=KVGeometry(3, 2, 24)), "stored"),
    (lambda p: replace(p, buffers=(*p.buffers, BufferSpec("x", 1))), "stands twice"),
    (lambda p: replace(p, weights=(*p.weights, WeightSpec("w", (), ("w",)))), "has shape"),
    (lambda p: replace(p, head=replace(p.head, source="q")), "is needed"),
]


EXPERTS = ExpertsConfig(count=4, top_k=2, width=10, normalized=True)
ILLEGAL_EXPERTS = [
    (drop(Route), "before it is written"),
    (change(Route, top_k=5), "5 of 4 experts"),
    (change(Route, top_k=0), "0 of 4 experts"),
    (change(Route, top_k=1), "wide"),
    (change(Route, out="x"), "wide"),
    (change(Route, source="normed"), "must be float32"),
    (change(Experts, routes="scores"), "no choice of 4"),
    (change(Experts, gate_up=("lm_head.weight",)), "no choice of 1"),
    (change(Experts, down=("lm_head.weight",)), "lack a weight"),
    (change(Experts, down=("lm_head.weight",) * 4), "is needed"),
    (change(Experts, gate_up=("lm_head.weight",) * 4), "no gate and up pairs"),
    (change(Experts, epilogue="relu"), "epilogue is relu"),
    (change(Experts, source="x"), "must be an activation"),
    (change(Experts, out="normed"), "must be float32"),
    (after(Route, Cast("scores", "routes")), "no choice of 4"),
    (reorder("model.layers.0.mlp.experts.3.down_proj.weight"), "columns in another order"),
]


@pytest.mark.parametrize(("damage", "message"), ILLEGAL_EXPERTS)
def test_illegal_experts(damage: Callable[[Program], Program], message: str) -> None:
    program = build(small_config(experts=EXPERTS))
    assert len(list(program.products())) == 2 * (2 + 1 + 2 * 4) + 1
    with pytest.raises(ValueError, match=message):
        check_program(damage(program))


@pytest.mark.parametrize(("damage", "message"), ILLEGAL)
def test_illegal_programs(program: Program, damage: Callable[[Program], Program], message: str) -> None:
    check_program(program)
    with pytest.raises(ValueError, match=message):
        check_program(damage(program))


def test_only_biases_are_optional(program: Program) -> None:
    weights = tuple(replace(w, optional=w.name == "model.norm.weight") for w in program.weights)
    with pytest.raises(ValueError, match="only biases"):
        check_program(replace(program, weights=weights))


def test_builder_refuses_two_meanings_of_a_name() -> None:
    builder = ProgramBuilder(KVGeometry(1, 1, 8), 10)
    assert builder.buffer("x", 8) == builder.buffer("x", 8)
    with pytest.raises(ValueError, match="buffer x"):
        builder.buffer("x", 9)
    builder.weight("w", 8)
    with pytest.raises(ValueError, match="weight w"):
        builder.weight("w", 9)


def test_fused_weights_name_their_sources(program: Program) -> None:
    fused = {spec.sources: spec.shape for spec in program.weights if len(spec.sources) > 1}
    prefix = "model.layers.0."
    qkv = tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
    assert fused[qkv] == ((4 + 2 * 2) * 24, 40)
    assert fused[tuple(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up"))] == (144, 40)


def test_tied_embeddings_are_one_weight() -> None:
    tied = build(small_config(tie_word_embeddings=True))
    assert tied.head.weight == "model.embed_tokens.weight"
    assert "lm_head.weight" not in {spec.name for spec in tied.weights}
