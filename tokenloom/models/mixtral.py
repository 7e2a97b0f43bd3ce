"""Mixtral: Mistral with a mixture of experts in every layer (Jiang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family, read_experts, sliding_everywhere
from tokenloom.models.json_fields import Fields


def build(config: ModelConfig) -> Program:
    """The forward pass of a `MixtralForCausalLM` checkpoint."""
    return decoder.build(config, experts=("block_sparse_moe", ("w1", "w3", "w2")))


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        windows=sliding_everywhere(written, config),
        experts=read_experts(written, config, width="intermediate_size", normalized=True),
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    build=build,
    read=_read,
    defaults={
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    names={"num_experts": "num_local_experts"},
)
