"""StarCoder 2: Llama with LayerNorms, biases everywhere, and an MLP without a gate (Lozhkov et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Names
from tokenloom.models.family import Family, read_activation, sliding_layers
from tokenloom.models.json_fields import Fields


def build(config: ModelConfig) -> Program:
    """The forward pass of a `Starcoder2ForCausalLM` checkpoint."""
    return decoder.build(config, Names(up=("mlp.c_fc",), down="mlp.c_proj"))


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    bias = written.flag("use_bias", True)
    return replace(
        config,
        layer_norm=True,
        rms_norm_eps=written.number("norm_epsilon", 1e-20, 1, default=1e-5),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation=read_activation(written, "hidden_act", "gelu_pytorch_tanh"),
        gated=False,
        windows=sliding_layers(written, config),
    )


STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    build=build,
    read=_read,
    defaults={
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    activation=None,
)
