"""Granite: Llama with factors on embedding, attention, residual stream and logits."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family
from tokenloom.models.json_fields import Fields


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    bias = written.flag("attention_bias", False)
    return replace(
        config,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=written.flag("mlp_bias", False),
        embedding_scale=written.number("embedding_multiplier", 0, 1e6, default=1.0, above=True),
        residual_scale=written.number("residual_multiplier", 0, 1e6, default=1.0, above=True),
        attention_scale=written.number("attention_multiplier", 0, 1e6, default=1.0, above=True),
        logits_divisor=written.number("logits_scaling", 0, 1e6, default=1.0, above=True),
    )


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    build=decoder.build,
    read=_read,
    defaults={"bos_token_id": 1, "eos_token_id": 2},
)
