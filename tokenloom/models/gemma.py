"""Gemma 2 and 3: norms on both sides of each block, GELU, scaled embeddings, windows in some layers. Gemma 2 caps
scores and logits; Gemma 3 norms q and k and turns the windowed layers with a table of their own (Gemma Team 2024,
2025)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from tokenloom.kernels.program import Program
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Blocks
from tokenloom.models.family import Family, sliding_layers
from tokenloom.models.json_fields import Fields

_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def build(config: ModelConfig) -> Program:
    """The forward pass of both."""
    blocks = Blocks(config)
    block_out = blocks.b.buffer("block_out", config.hidden_size)
    added = blocks.b.buffer("added", config.hidden_size)
    blocks.embed()
    blocks.norm("model.layers.0.input_layernorm", blocks.x, blocks.normed)
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        blocks.attention(layer, block_out, residual=False)
        blocks.norm(p + "post_attention_layernorm", block_out, added)
        blocks.norm(p + "pre_feedforward_layernorm", blocks.x, blocks.normed, add=added)
        blocks.mlp(layer, block_out, residual=False)
        blocks.norm(p + "post_feedforward_layernorm", block_out, added)
        following = (
            f"model.layers.{layer + 1}.input_layernorm" if layer + 1 < config.num_layers else "model.norm"
        )
        blocks.norm(following, blocks.x, blocks.normed, add=added)
    return blocks.head()


def _common(written: Fields, config: ModelConfig) -> ModelConfig:
    for name in ("hidden_activation", "hidden_act"):
        if written.data.get(name, "gelu_pytorch_tanh") not in (None, "gelu_pytorch_tanh"):
            written.refuse(name, "'gelu_pytorch_tanh'")
    if written.flag("use_bidirectional_attention", False):
        written.refuse("use_bidirectional_attention", "false (a text is generated from left to right)")
    bias = written.flag("attention_bias", False)
    # transformers rounds the factor to the type of the embedding.
    root = np.float32(config.hidden_size**0.5)
    types = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    return replace(
        config,
        attention_bias=bias,
        output_bias=bias,
        activation="gelu",
        norm_offset=1.0,
        embedding_scale=float(root.astype(types[config.dtype])),
        attention_scale=written.number("query_pre_attn_scalar", 0, 1e9, above=True) ** -0.5,
        attention_softcap=written.optional_number("attn_logit_softcapping", 0, 1e9, above=True),
        logits_softcap=written.optional_number("final_logit_softcapping", 0, 1e9, above=True),
    )


def _alternating(config: ModelConfig, period: int) -> list[str]:
    """All layers slide but each `period`-th."""
    return [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(config.num_layers)
    ]


def _read_gemma2(written: Fields, config: ModelConfig) -> ModelConfig:
    windows = sliding_layers(written, config, _alternating(config, 2))
    return replace(_common(written, config), windows=windows)


def _read_gemma3(written: Fields, config: ModelConfig) -> ModelConfig:
    period = written.integer("sliding_window_pattern", 1, 1 << 12, default=6)
    windows = sliding_layers(written, config, _alternating(config, period))
    return replace(_common(written, config), windows=windows, qk_norm="head")


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    build=build,
    read=_read_gemma2,
    defaults=_DEFAULTS
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    activation=None,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    build=build,
    read=_read_gemma3,
    defaults=_DEFAULTS | {"max_position_embeddings": 131072},
    activation=None,
    default_theta=(1_000_000.0, 10_000.0),
)
