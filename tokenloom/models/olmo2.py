"""OLMo 2: no norm before a block but one behind it, and norms over all of q and of k (OLMo et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Blocks
from tokenloom.models.family import Family
from tokenloom.models.json_fields import Fields


def build(config: ModelConfig) -> Program:
    """The forward pass of an `Olmo2ForCausalLM` checkpoint."""
    blocks = Blocks(config)
    b = blocks.b
    block_out = b.buffer("block_out", config.hidden_size)
    added = b.buffer("added", config.hidden_size)
    blocks.embed()
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        b.cast(blocks.x, blocks.normed, add=added if layer else None)
        blocks.attention(layer, block_out, residual=False)
        blocks.norm(p + "post_attention_layernorm", block_out, added)
        b.cast(blocks.x, blocks.normed, add=added)
        blocks.mlp(layer, block_out, residual=False)
        blocks.norm(p + "post_feedforward_layernorm", block_out, added)
    blocks.norm("model.norm", blocks.x, blocks.normed, add=added)
    return blocks.head()


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    bias = written.flag("attention_bias", False)
    return replace(config, attention_bias=bias, output_bias=bias, qk_norm="all")


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    build=build,
    read=_read,
    defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279},
)
