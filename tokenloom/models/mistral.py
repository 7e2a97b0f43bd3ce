"""Mistral: Llama with a sliding window (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family, sliding_layers
from tokenloom.models.json_fields import Fields


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    return replace(config, windows=sliding_layers(written, config))


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    build=decoder.build,
    read=_read,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
