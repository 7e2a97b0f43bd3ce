"""Qwen 2 and 2.5: Llama with biases on q, k and v. Qwen 3: a norm over each head of q and k instead, and a
mixture of experts in the MoE models."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.family import Family, read_experts, sliding_everywhere, sliding_layers
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


def _read_qwen3_moe(written: Fields, config: ModelConfig) -> ModelConfig:
    """Layers have experts but for those of `mlp_only_layers`, and `decoder_sparse_step` says every how many."""
    step = written.integer("decoder_sparse_step", 1, 1 << 12, default=1)
    listed = written.data.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        written.refuse("mlp_only_layers", "a list of numbers of layers")
    dense = {layer for layer in range(config.num_layers) if layer in listed or (layer + 1) % step}
    experts = read_experts(
        written,
        config,
        width="moe_intermediate_size",
        normalized=written.flag("norm_topk_prob", False),
        dense_layers=frozenset(dense),
    )
    # transformers reads no max_window_layers here.
    slides = written.flag("use_sliding_window", False)
    windows = sliding_everywhere(written, config) if slides else ()
    return replace(_read_qwen3(written, config), experts=experts, windows=windows)


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
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    build=decoder.build,
    read=_read_qwen3_moe,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    names={"num_experts": "num_local_experts"},
)
