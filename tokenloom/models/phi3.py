"""Phi 3 and 4: Llama with fused q/k/v and gate/up tensors; some rotate a part of each head only (Abdin et al.
2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Names
from tokenloom.models.family import Family, sliding_layers
from tokenloom.models.json_fields import Fields


def build(config: ModelConfig) -> Program:
    """The forward pass of a `Phi3ForCausalLM` checkpoint."""
    return decoder.build(config, Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)))


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    return replace(config, windows=sliding_layers(written, config))


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    build=build,
    read=_read,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    partial_rotary=True,
    rope_kinds={"su": "longrope", "yarn": "longrope"},  # as transformers reads them
)
