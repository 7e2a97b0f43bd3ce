"""StableLM: LayerNorms, and a quarter of each head that rotates (Bellagente et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Blocks
from tokenloom.models.family import Family
from tokenloom.models.json_fields import Fields


def build(config: ModelConfig) -> Program:
    """The forward pass of a `StableLmForCausalLM` checkpoint."""
    if not config.parallel_residual:
        return decoder.build(config)
    blocks = Blocks(config)
    blocks.embed()
    for layer in range(config.num_layers):
        # Both halves read the same norm of what was there before.
        blocks.norm(f"model.layers.{layer}.input_layernorm", blocks.x, blocks.normed)
        blocks.attention(layer, blocks.x)
        blocks.mlp(layer, blocks.x)
    return blocks.finish()


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    if written.flag("qk_layernorm", False):
        written.refuse("qk_layernorm", "false")
    return replace(
        config,
        layer_norm=True,
        rms_norm_eps=written.number("layer_norm_eps", 1e-20, 1, default=1e-5),
        attention_bias=written.flag("use_qkv_bias", False),
        parallel_residual=written.flag("use_parallel_residual", False),
    )


STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    build=build,
    read=_read,
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    partial_rotary=True,
)
