"""Qwen 2 and 2.5: Llama with biases on q, k and v. Qwen 3: a norm over each head of q and k instead."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family, sliding_layers
from tokenloom.models.json_fields import Fields

_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}


def _windows(written: Fields, config: ModelConfig) -> tuple[int | None, ...]:
    """The layers from `max_window_layers` on slide, if any do."""
    if not written.flag("use_sliding_window", False):
        return ()
    first = min(written.integer("max_window_layers", 0, 1 << 12, default=28), config.num_layers)
    default = ["full_attention"] * first + ["sliding_attention"] * (config.num_layers - first)
    return sliding_layers(written, config, default)


def _read_qwen2(written: Fields, config: ModelConfig) -> ModelConfig:
    return replace(config, attention_bias=True, windows=_windows(written, config))


def _read_qwen3(written: Fields, config: ModelConfig) -> ModelConfig:
    bias = written.flag("attention_bias", False)
    return replace(
        config, attention_bias=bias, output_bias=bias, qk_norm="head", windows=_windows(written, config)
    )


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    build=decoder.build,
    read=_read_qwen2,
    defaults=_DEFAULTS,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    build=decoder.build,
    read=_read_qwen3,
    defaults=_DEFAULTS | {"head_dim": 128},
)
