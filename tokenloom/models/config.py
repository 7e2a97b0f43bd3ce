"""The architecture of a model as the builders need it, independent of any file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenloom.quantization.config import WeightQuantization

Activation = Literal["silu", "gelu", "gelu_erf", "relu"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, names as in Hugging Face `rope_scaling`.

    `theta` is the base. `factor` stretches positions (linear, llama3, yarn, dynamic). `original_context` is
    the length that the model was trained with before stretching; `dynamic` and `longrope` are served only up to
    it. `low_freq_factor` and `high_freq_factor` belong to llama3; `beta_fast`, `beta_slow`,
    `attention_factor`, `mscale`, `mscale_all_dim`, `truncate` to yarn; `short_factor` (one number per
    frequency) to longrope. `rotary_dim` is the number of leading head dimensions that rotate.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_dim: int
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP: `count` gated MLPs that are `width` wide, of which each token
    takes the best `top_k`. `normalized`: their weights add up to 1. The MLP of `dense_layers` is an ordinary one."""

    count: int
    top_k: int
    width: int
    normalized: bool
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and options of a decoder-only model.

    `max_context` is the number of tokens that the model can be served with (after RoPE scaling rules);
    `learned_positions` that for which it has a row each, 0 where it has none.
    `eos_token_ids` come from generation_config.json where present, else from config.json. `dtype` is that of
    the checkpoint. `quantization` says how its linears are stored if they are quantised.

    `attention_bias` is that of q, k and v, `output_bias` that of the projection behind attention. `qk_norm`: an
    RMSNorm over each head of q and k, or over all heads together. `parallel_residual`: attention and MLP read the
    same residual stream, through one norm or two. `windows` has one entry per layer, the number of last tokens that
    it sees or None for all; empty: all layers see all. `activation` is that of the MLP ("gelu" its tanh form,
    "gelu_erf" the exact one), which is `gated` or not. `layer_norm`: norms are LayerNorms with biases.
    `norm_offset` is added to the weights of norms. `embedding_scale`, `residual_scale` and `logits_divisor` are
    factors of the embedding, of what a block adds to the residual stream, and below the logits;
    `attention_scale` is that of q (None: 1 / sqrt(head_dim)). `attention_softcap` and `logits_softcap` bound
    scores and logits. `local_rope` turns the layers with a window, where it is not None. `experts`: layers have them in
    place of the MLP. `matryoshka` are the lengths to which the model was trained to have its embeddings cut; empty: to
    any, None: to none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float
    rope: RopeConfig
    learned_positions: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    parallel_residual: bool = False
    windows: tuple[int | None, ...] = ()
    activation: Activation = "silu"
    gated: bool = True
    layer_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    logits_divisor: float = 1.0
    norm_offset: float = 0.0
    local_rope: RopeConfig | None = None
    experts: ExpertsConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: WeightQuantization | None = None
    matryoshka: tuple[int, ...] | None = None

    def window(self, layer: int) -> int | None:
        """How many of the last tokens a layer sees; None: all."""
        return self.windows[layer] if self.windows else None

    @property
    def query_scale(self) -> float:
        """What q is multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim
