"""How GGUF calls the tensors of the families, and how it bends them.

llama.cpp has one name for what Hugging Face calls differently in each family. Three families are stored in another
form too: Llama's q and k have the rows of a head interleaved (its RoPE turns neighbours, ours halves); Gemma's norms
have their 1 added; GPT-2's linears are turned to [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS: Final = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_PLAIN: Final = re.compile(r"([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The tensors of one architecture. `outer` and `layer` map the middles of names, `prefix` comes before the
    number of a layer; `experts` maps stacks of experts to names with a place for the number of one. `interleaved`: rows
    of q and k are. `norm_offset` was added to norms. `turned`: linears of layers are [in, out] for Hugging Face."""

    layer: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    prefix: str = "model.layers."
    experts: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    turned: bool = False

    def name(self, name: str) -> str:
        """The Hugging Face name of a tensor; its own where it has none."""
        block = _BLOCK.fullmatch(name)
        if block is not None and block[2] in self.layer:
            return f"{self.prefix}{block[1]}.{self.layer[block[2]]}.{block[3]}"
        plain = _PLAIN.fullmatch(name)
        if plain is not None and plain[1] in self.outer:
            return f"{self.outer[plain[1]]}.{plain[2]}"
        return name

    def expert_names(self, name: str, count: int) -> list[str]:
        """The Hugging Face names of the matrices in a stack of `count` experts; none for any other tensor."""
        block = _BLOCK.fullmatch(name)
        if block is None or block[2] not in self.experts or block[3] != "weight":
            return []
        each = f"{self.prefix}{block[1]}.{self.experts[block[2]]}.weight"
        return [each.format(i) for i in range(count)]

    def is_interleaved(self, name: str) -> bool:
        """Whether the rows of tensor `name` have to be put in order."""
        return self.interleaved and (".attn_q." in name or ".attn_k." in name)

    def is_turned(self, name: str) -> bool:
        """Whether the tensor is a linear that Hugging Face stores the other way."""
        block = _BLOCK.fullmatch(name)
        return self.turned and block is not None and block[3] == "weight" and not block[2].endswith("norm")

    def offset(self, name: str) -> float:
        """What was added to the tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


_QWEN3: Final = Naming(layer=_LAYER | _HEAD_NORMS)
_INTERLEAVED: Final = Naming(layer=_LAYER, interleaved=True)
_MIXTURE: Final = Naming(layer=_LAYER | _HEAD_NORMS | {"ffn_gate_inp": "mlp.gate"}, experts=_EXPERTS)

NAMINGS: Final[Mapping[str, Naming]] = {
    "llama": Naming(
        layer=_LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts={
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        },
        interleaved=True,
    ),
    "granite": _INTERLEAVED,
    "qwen2": Naming(layer=_LAYER),
    "qwen3": _QWEN3,
    "qwen3moe": _MIXTURE,
    "olmoe": _MIXTURE,
    "stablelm": _QWEN3,
    "gemma2": Naming(layer=_LAYER | _SANDWICH, norm_offset=1.0),
    "gemma3": Naming(layer=_LAYER | _HEAD_NORMS | _SANDWICH, norm_offset=1.0),
    "olmo2": Naming(
        layer={
            name: theirs for name, theirs in (_LAYER | _HEAD_NORMS | _SANDWICH).items() if name != "ffn_norm"
        }
    ),
    "phi3": Naming(
        layer=_LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "gpt2": Naming(
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        prefix="transformer.h.",
        turned=True,
    ),
}
"""By `general.architecture`. Llama's covers Mistral and Mixtral."""

ROPE_FACTORS: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that belong to the configuration: divisors of the frequencies."""
