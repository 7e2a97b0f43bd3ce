"""GPT-2 and OPT: LayerNorms, learned positions, biases everywhere, an MLP without a gate (Radford et al. 2019;
Zhang et al. 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.program import Epilogue, KVGeometry, Program
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import plain_epilogue
from tokenloom.models.family import Family, read_activation
from tokenloom.models.json_fields import Fields


class _Names(NamedTuple):
    """Where a checkpoint keeps its tensors. `transposed`: linears are [in, out]."""

    tokens: str
    positions: str
    offset: int
    layer: str
    qkv: tuple[str, ...]
    out: str
    first_norm: str
    second_norm: str
    up: str
    down: str
    last_norm: str
    transposed: bool


_GPT2 = _Names(
    "transformer.wte", "transformer.wpe", 0, "transformer.h.", ("attn.c_attn",), "attn.c_proj", "ln_1", "ln_2",
    "mlp.c_fc", "mlp.c_proj", "transformer.ln_f", True,
)  # fmt: skip
_OPT = _Names(
    "model.decoder.embed_tokens", "model.decoder.embed_positions", 2, "model.decoder.layers.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", "self_attn_layer_norm",
    "final_layer_norm", "fc1", "fc2", "model.decoder.final_layer_norm", False,
)  # fmt: skip


def _build(config: ModelConfig, names: _Names) -> Program:
    kv = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    b = ProgramBuilder(kv, config.vocab_size)
    hidden, ffn, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    x, normed = b.buffer("x", hidden), b.buffer("normed", hidden, "activation")
    qkv, q = b.buffer("qkv", 3 * hidden), b.buffer("q", hidden)
    attended, inner = b.buffer("attended", hidden, "activation"), b.buffer("inner", ffn, "activation")

    def norm(name: str) -> None:
        weight, bias = b.weight(f"{name}.weight", hidden), b.weight(f"{name}.bias", hidden)
        b.layer_norm(x, weight, normed, eps, bias=bias)

    def linear(
        source: str, parts: tuple[str, ...], out: str, rows: int, depth: int, epilogue: Epilogue
    ) -> None:
        weight = b.weight(tuple(f"{part}.weight" for part in parts), rows, depth, transposed=names.transposed)
        bias = b.weight(tuple(f"{part}.bias" for part in parts), rows)
        b.linear(source, weight, out, bias=bias, epilogue=epilogue)

    embedding = b.weight(f"{names.tokens}.weight", config.vocab_size, hidden)
    positions = b.weight(f"{names.positions}.weight", config.learned_positions + names.offset, hidden)
    b.embed(embedding, x)
    b.embed_positions(positions, x, offset=names.offset)
    for layer in range(config.num_layers):
        p = f"{names.layer}{layer}."
        norm(p + names.first_norm)
        linear(normed, tuple(p + name for name in names.qkv), qkv, 3 * hidden, hidden, "none")
        b.rope_store(qkv, q, layer=layer, num_heads=config.num_heads, rotary_dim=0)
        b.attention(q, attended, layer=layer, num_heads=config.num_heads, scale=config.query_scale)
        linear(attended, (p + names.out,), x, hidden, hidden, "residual")
        norm(p + names.second_norm)
        linear(normed, (p + names.up,), inner, ffn, hidden, plain_epilogue(config.activation))
        linear(inner, (p + names.down,), x, hidden, ffn, "residual")
    norm(names.last_norm)
    head = embedding if config.tie_word_embeddings else b.weight("lm_head.weight", config.vocab_size, hidden)
    return b.finish(normed, head)


def build_gpt2(config: ModelConfig) -> Program:
    """The forward pass of a `GPT2LMHeadModel` checkpoint."""
    return _build(config, _GPT2)


def build_opt(config: ModelConfig) -> Program:
    """The forward pass of an `OPTForCausalLM` checkpoint."""
    return _build(config, _OPT)


def _without(written: Fields, *names: str) -> None:
    for name in names:
        if written.flag(name, False):
            written.refuse(name, "false")


def _plain(written: Fields, config: ModelConfig, activation: str) -> ModelConfig:
    if config.q_size != config.hidden_size:
        written.refuse(
            "head_dim", f"hidden_size / num_attention_heads ({config.hidden_size // config.num_heads})"
        )
    return replace(
        config,
        activation=read_activation(written, "activation_function", activation),
        gated=False,
        num_kv_heads=config.num_heads,
        learned_positions=config.max_context,
        layer_norm=True,
        rms_norm_eps=written.number("layer_norm_epsilon", 1e-20, 1, default=1e-5),
        rope=replace(config.rope, rotary_dim=0),
    )


def _read_gpt2(written: Fields, config: ModelConfig) -> ModelConfig:
    _without(written, "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
    if not written.flag("scale_attn_weights", True):
        config = replace(config, attention_scale=1.0)
    return _plain(written, config, "gelu_new")


def _read_opt(written: Fields, config: ModelConfig) -> ModelConfig:
    _without(written, "_remove_final_layer_norm")
    for name in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        if not written.flag(name, True):
            written.refuse(name, "true")
    if written.integer("word_embed_proj_dim", 1, 1 << 20, default=config.hidden_size) != config.hidden_size:
        written.refuse("word_embed_proj_dim", f"hidden_size ({config.hidden_size})")
    return _plain(written, config, "relu")


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    build=build_gpt2,
    read=_read_gpt2,
    names={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    },
    defaults={"n_positions": 1024, "tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256},
    activation=None,
)
OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    build=build_opt,
    read=_read_opt,
    names={"intermediate_size": "ffn_dim"},
    defaults={
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    activation=None,
)
