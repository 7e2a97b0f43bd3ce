"""Llama: RMSNorm, grouped-query attention, RoPE, SwiGLU (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family
from tokenloom.models.json_fields import Fields

build = decoder.build


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    bias = written.flag("attention_bias", False)
    return replace(config, attention_bias=bias, output_bias=bias, mlp_bias=written.flag("mlp_bias", False))


LLAMA = Family(model_type="llama", architecture="LlamaForCausalLM", build=build, read=_read)
