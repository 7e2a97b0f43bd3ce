"""Llama: RMSNorm, grouped-query attention, RoPE, SwiGLU (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

from tokenloom.kernels.program import KVGeometry, Program, ProgramBuilder
from tokenloom.models.config import ModelConfig


def build(config: ModelConfig) -> Program:
    """The forward pass of a Hugging Face `LlamaForCausalLM` checkpoint with these shapes."""
    kv = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim)
    b = ProgramBuilder(kv, config.vocab_size)
    hidden, ffn, q_size = config.hidden_size, config.intermediate_size, config.q_size
    qkv_size = q_size + 2 * config.kv_size

    x = b.buffer("x", hidden)
    normed = b.buffer("normed", hidden, "activation")
    qkv = b.buffer("qkv", qkv_size)
    q = b.buffer("q", q_size)
    attended = b.buffer("attended", q_size, "activation")
    gated = b.buffer("gated", ffn, "activation")

    embedding = b.weight("model.embed_tokens.weight", config.vocab_size, hidden)
    b.embed(embedding, x)
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        attention = [f"{p}self_attn.{name}_proj" for name in "qkv"]
        gate_up = [f"{p}mlp.{name}_proj" for name in ("gate", "up")]

        b.rms_norm(x, b.weight(p + "input_layernorm.weight", hidden), normed, config.rms_norm_eps)
        b.linear(
            normed,
            b.weight(tuple(f"{name}.weight" for name in attention), qkv_size, hidden),
            qkv,
            bias=b.weight(tuple(f"{name}.bias" for name in attention), qkv_size)
            if config.attention_bias
            else None,
        )
        b.rope_store(qkv, q, layer=layer, num_heads=config.num_heads, rotary_dim=config.rope.rotary_dim)
        b.attention(q, attended, layer=layer, num_heads=config.num_heads, scale=config.head_dim**-0.5)
        b.linear(
            attended,
            b.weight(p + "self_attn.o_proj.weight", hidden, q_size),
            x,
            bias=b.weight(p + "self_attn.o_proj.bias", hidden) if config.attention_bias else None,
            epilogue="residual",
        )

        b.rms_norm(x, b.weight(p + "post_attention_layernorm.weight", hidden), normed, config.rms_norm_eps)
        b.linear(
            normed,
            b.weight(tuple(f"{name}.weight" for name in gate_up), 2 * ffn, hidden),
            gated,
            bias=b.weight(tuple(f"{name}.bias" for name in gate_up), 2 * ffn) if config.mlp_bias else None,
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
