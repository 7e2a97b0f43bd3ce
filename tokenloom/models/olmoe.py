"""OLMoE: norms over all of q and of k, and a mixture of experts in every layer (Muennighoff et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family, read_experts
from tokenloom.models.json_fields import Fields


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    if written.data.get("clip_qkv") is not None:
        written.refuse("clip_qkv", "null")
    bias = written.flag("attention_bias", False)
    experts = read_experts(
        written, config, width="intermediate_size", normalized=written.flag("norm_topk_prob", False)
    )
    return replace(config, attention_bias=bias, output_bias=bias, qk_norm="all", experts=experts)


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    build=decoder.build,
    read=_read,
    defaults={
        "intermediate_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "eos_token_id": 50279,
    },
    names={"num_experts": "num_local_experts"},
)
