"""The decoder layer that most families share: a norm before attention and one before a gated MLP.

Families differ in biases, norms of q and k, windows, and in how their tensors are called and fused.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.kernels.program import KVGeometry, Program, ProgramBuilder
from tokenloom.models.config import ModelConfig


def build(
    config: ModelConfig,
    *,
    qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    gate_up: Sequence[str] = ("gate_proj", "up_proj"),
) -> Program:
    """The forward pass; `qkv` and `gate_up` are the tensors that are stacked, or the one that holds them all."""
    kv = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    b = ProgramBuilder(kv, config.vocab_size)
    hidden, ffn, q_size = config.hidden_size, config.intermediate_size, config.q_size
    qkv_size = q_size + 2 * config.kv_size

    x = b.buffer("x", hidden)
    normed = b.buffer("normed", hidden, "activation")
    stacked = b.buffer("qkv", qkv_size)
    q = b.buffer("q", q_size)
    attended = b.buffer("attended", q_size, "activation")
    gated = b.buffer("gated", ffn, "activation")

    embedding = b.weight("model.embed_tokens.weight", config.vocab_size, hidden)
    b.embed(embedding, x)
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        attention = [f"{p}self_attn.{name}" for name in qkv]
        mlp = [f"{p}mlp.{name}" for name in gate_up]
        norms = [b.weight(f"{p}self_attn.{n}_norm.weight", config.head_dim) for n in "qk" if config.qk_norm]

        b.rms_norm(x, b.weight(p + "input_layernorm.weight", hidden), normed, config.rms_norm_eps)
        b.linear(
            normed,
            b.weight(tuple(f"{name}.weight" for name in attention), qkv_size, hidden),
            stacked,
            bias=b.weight(tuple(f"{name}.bias" for name in attention), qkv_size)
            if config.attention_bias
            else None,
        )
        b.rope_store(
            stacked,
            q,
            layer=layer,
            num_heads=config.num_heads,
            rotary_dim=config.rope.rotary_dim,
            norms=(norms[0], norms[1]) if norms else None,
            epsilon=config.rms_norm_eps if norms else 0.0,
        )
        b.attention(
            q,
            attended,
            layer=layer,
            num_heads=config.num_heads,
            scale=config.head_dim**-0.5,
            window=config.window(layer),
        )
        b.linear(
            attended,
            b.weight(p + "self_attn.o_proj.weight", hidden, q_size),
            x,
            bias=b.weight(p + "self_attn.o_proj.bias", hidden) if config.output_bias else None,
            epilogue="residual",
        )

        b.rms_norm(x, b.weight(p + "post_attention_layernorm.weight", hidden), normed, config.rms_norm_eps)
        b.linear(
            normed,
            b.weight(tuple(f"{name}.weight" for name in mlp), 2 * ffn, hidden),
            gated,
            bias=b.weight(tuple(f"{name}.bias" for name in mlp), 2 * ffn) if config.mlp_bias else None,
            epilogue="silu_mul",
        )
        b.linear(
            gated,
            b.weight(p + "mlp.down_proj.weight", hidden, ffn),
            x,
            bias=b.weight(p + "mlp.down_proj.bias", hidden) if config.mlp_bias else None,
            epilogue="residual",
        )
    b.rms_norm(x, b.weight("model.norm.weight", hidden), normed, config.rms_norm_eps)
    head = embedding if config.tie_word_embeddings else b.weight("lm_head.weight", config.vocab_size, hidden)
    return b.finish(normed, head)
