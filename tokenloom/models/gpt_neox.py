"""GPT-NeoX and Pythia: LayerNorms, a quarter of each head that rotates, q, k and v fused head by head, an MLP without
a gate, mostly beside attention (Black et al. 2022; Biderman et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from tokenloom.kernels.program import Program
from tokenloom.models import decoder
from tokenloom.models.config import ModelConfig
from tokenloom.models.decoder import Blocks, Names
from tokenloom.models.family import Family, read_activation
from tokenloom.models.json_fields import Fields

_NAMES = Names(
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers.",
    qkv=("attention.query_key_value",),
    by_head=True,
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    last_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


def build(config: ModelConfig) -> Program:
    """The forward pass of a `GPTNeoXForCausalLM` checkpoint."""
    if not config.parallel_residual:
        return decoder.build(config, _NAMES)
    blocks = Blocks(config, _NAMES)
    beside = blocks.b.buffer("beside", config.hidden_size, "activation")
    blocks.embed()
    for layer in range(config.num_layers):
        # Each half has a norm of its own, of what was there before both.
        p = blocks.layer(layer)
        blocks.norm(p + "input_layernorm", blocks.x, blocks.normed)
        blocks.norm(p + "post_attention_layernorm", blocks.x, beside)
        blocks.attention(layer, blocks.x)
        blocks.mlp(layer, blocks.x, source=beside)
    return blocks.finish()


def _read(written: Fields, config: ModelConfig) -> ModelConfig:
    if config.q_size != config.hidden_size:
        written.refuse(
            "head_dim", f"hidden_size / num_attention_heads ({config.hidden_size}/{config.num_heads})"
        )
    bias = written.flag("attention_bias", True)
    return replace(
        config,
        num_kv_heads=config.num_heads,
        layer_norm=True,
        rms_norm_eps=written.number("layer_norm_eps", 1e-20, 1, default=1e-5),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        activation=read_activation(written, "hidden_act", "gelu"),
        gated=False,
        parallel_residual=written.flag("use_parallel_residual", True),
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    build=build,
    read=_read,
    names={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    defaults={"rotary_pct": 0.25, "bos_token_id": 0, "eos_token_id": 2},
    partial_rotary=True,
    activation=None,
)
