"""The metadata of a GGUF file as the object of a config.json, which families read as they read any other.

Keys of the architecture that are not known are refused by name: they may change what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from tokenloom.errors import ModelError
from tokenloom.gguf.file import GgufFile
from tokenloom.gguf.header import Array
from tokenloom.kernels.program import MAX_CHOSEN, MAX_EXPERTS
from tokenloom.models.gguf_names import NAMINGS
from tokenloom.models.hf_config import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    GenerationDefaults,
)

# What we call the architecture, and its field for the epsilon of norms.
_FAMILIES: Final[Mapping[str, tuple[str, str, str]]] = {
    "llama": ("llama", "LlamaForCausalLM", "rms_norm_eps"),
    "granite": ("granite", "GraniteForCausalLM", "rms_norm_eps"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "rms_norm_eps"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "rms_norm_eps"),
    "stablelm": ("stablelm", "StableLmForCausalLM", "layer_norm_eps"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", "rms_norm_eps"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", "rms_norm_eps"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", "rms_norm_eps"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", "rms_norm_eps"),
    "olmoe": ("olmoe", "OlmoeForCausalLM", "rms_norm_eps"),
    "phi3": ("phi3", "Phi3ForCausalLM", "rms_norm_eps"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", "layer_norm_epsilon"),
}
_KNOWN: Final = frozenset(
    """
    context_length embedding_length block_count feed_forward_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length attention.scale
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon attention.causal
    attention.sliding_window attention.sliding_window_pattern
    rope.dimension_count rope.freq_base rope.freq_base_swa rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_ext_factor rope.scaling.yarn_log_multiplier
    attn_logit_softcapping final_logit_softcapping use_parallel_residual
    embedding_scale residual_scale logit_scale expert_count expert_used_count
    expert_feed_forward_length
    tensor_data_layout
    """.split()
)
# Tokens that end a turn, by which files older than the key for them are understood.
_ENDS_OF_TURN: Final = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>",
)  # fmt: skip
_CONTROL: Final = 3
_WINDOW_PERIODS: Final = {"gemma2": 2, "gemma3": 6}
# The one size of Gemma 2 and of 3 that scales by width / heads, told by its layers as llama.cpp does.
_WIDTH_SCALED: Final = {"gemma2": 46, "gemma3": 62}


def read_gguf_config(file: GgufFile) -> dict[str, Any]:
    """The object of a config.json that says what the file says. Raises `ModelError`."""
    return _Reader(file).config()


def read_gguf_defaults(file: GgufFile) -> GenerationDefaults:
    """The sampling defaults of the file (`general.sampling.*`). Raises `ModelError`."""
    key = "general.sampling."
    return GenerationDefaults(
        temperature=_within(file, key + "temp", 0, 100),
        top_p=_within(file, key + "top_p", 1e-6, 1),
        top_k=file.optional_integer(key + "top_k", -1, (1 << 31) - 1),
        min_p=_within(file, key + "min_p", 0, 1),
        repetition_penalty=_within(file, key + "penalty_repeat", 0.01, 100),
    )


def _within(file: GgufFile, key: str, low: float, high: float) -> float | None:
    value = file.optional_number(key)
    if value is not None and not low <= value <= high:
        file.refuse(key, f"a number from {low:g} to {high:g}")
    # The file holds fp32: 0.7 is meant where it says 0.699999988.
    return None if value is None else float(f"{value:.7g}")


class _Reader:
    """Look-ups under the architecture's own prefix."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        if file.optional_integer("split.count", 0, (1 << 16) - 1) not in (None, 0, 1):
            file.refuse("split.count", "1: a model in one file (llama-gguf-split --merge joins several)")
        self.arch = file.text("general.architecture")
        if self.arch not in NAMINGS:
            file.refuse("general.architecture", ", ".join(NAMINGS))
        least = 1 if self.arch in ("qwen3moe", "olmoe") else 0
        most = MAX_EXPERTS if least or self.arch == "llama" else 0
        self.num_experts = file.integer(self.key("expert_count"), least, most, default=0)
        for key in file.metadata:
            if key.startswith(f"{self.arch}.") and key.removeprefix(f"{self.arch}.") not in _KNOWN:
                raise ModelError(
                    f"{file.path}: the metadata {key}, which is not known", ", ".join(sorted(_KNOWN))
                )

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def has(self, *tensors: str) -> bool:
        return any(name in self.file.tensors for name in tensors)

    def integer(self, name: str, high: int, default: int | None = None) -> int:
        return self.file.integer(self.key(name), 1, high, default)

    def config(self) -> dict[str, Any]:
        model_type, architecture, epsilon = _FAMILIES[self.arch]
        heads = self.integer("attention.head_count", MAX_HEADS)
        width = self.integer("embedding_length", MAX_WIDTH)
        config: dict[str, Any] = {
            "model_type": model_type,
            "architectures": [architecture],
            "hidden_size": width,
            "num_hidden_layers": self.integer("block_count", MAX_LAYERS),
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", MAX_HEADS, default=heads),
            "intermediate_size": self.integer("feed_forward_length", MAX_WIDTH),
            "max_position_embeddings": self.integer("context_length", MAX_CONTEXT),
            "head_dim": self._head_dim(width, heads),
            epsilon: self._epsilon(epsilon),
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": not self.has("output.weight"),
            # What llama.cpp computes with; it decides to what Gemma's factor of the embedding is rounded.
            "torch_dtype": "float32",
        }
        if self.arch == "gpt2":
            config |= {"n_embd": width, "n_positions": config["max_position_embeddings"], "n_head": heads}
            config |= {"n_layer": config["num_hidden_layers"], "n_inner": config["intermediate_size"]}
        config |= self._rope(config["head_dim"], config["max_position_embeddings"])
        config |= self._special_tokens(config["vocab_size"])
        config |= self._options(config)
        config |= self._experts(config["intermediate_size"])
        self._check_sequence()
        return config

    def _head_dim(self, width: int, heads: int) -> int:
        if self.key("attention.key_length") not in self.file.metadata and width % heads:
            self.file.refuse(self.key("attention.head_count"), f"a divisor of embedding_length ({width})")
        head_dim = self.integer("attention.key_length", MAX_HEAD_DIM, default=width // heads)
        if self.integer("attention.value_length", MAX_HEAD_DIM, default=head_dim) != head_dim:
            self.file.refuse(self.key("attention.value_length"), f"the key_length ({head_dim})")
        return head_dim

    def _epsilon(self, field: str) -> float:
        name = "rms_epsilon" if field == "rms_norm_eps" else "epsilon"
        return self.file.number(self.key(f"attention.layer_norm_{name}"))

    def _vocab_size(self) -> int:
        info = self.file.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            found = (
                "without token_embd.weight" if info is None else f"with token_embd.weight {list(info.shape)}"
            )
            raise ModelError(f"{self.file.path} {found}", "a model with its embedding [tokens, width]")
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Array) and tokens.count > info.shape[0]:
            self.file.refuse("tokenizer.ggml.tokens", f"at most the {info.shape[0]} tokens of the embedding")
        return info.shape[0]

    def _check_sequence(self) -> None:
        """Refuse what would be another way to compute."""
        if not self.file.flag(self.key("attention.causal"), True):
            self.file.refuse(self.key("attention.causal"), "true")
        if self.arch == "granite" and not self.file.flag(self.key("rope.scaling.finetuned"), True):
            self.file.refuse(self.key("rope.scaling.finetuned"), "true (without it nothing rotates)")
        allowed = {
            "attention.scale": ("granite",),
            "embedding_scale": ("granite",),
            "residual_scale": ("granite",),
            "logit_scale": ("granite",),
            "attn_logit_softcapping": ("gemma2",),
            "final_logit_softcapping": ("gemma2", "gemma3"),
            "rope.freq_base_swa": ("gemma3",),
            "attention.sliding_window_pattern": ("gemma2", "gemma3"),
        }
        for name, archs in allowed.items():
            if self.key(name) in self.file.metadata and self.arch not in archs:
                self.file.refuse(self.key(name), f"left out for {self.arch}")

    # --- rotary embedding --------------------------------------------------------------------------------

    def _rope(self, head_dim: int, context: int) -> dict[str, Any]:
        if self.arch == "gpt2":
            return {}
        config: dict[str, Any] = {"rope_theta": self.file.number(self.key("rope.freq_base"), 10000.0)}
        rotary = self.integer("rope.dimension_count", MAX_HEAD_DIM, default=head_dim)
        if rotary > head_dim or rotary % 2:
            self.file.refuse(self.key("rope.dimension_count"), f"an even number up to {head_dim}")
        if rotary != head_dim and self.arch not in ("phi3", "stablelm"):
            self.file.refuse(self.key("rope.dimension_count"), f"{head_dim}, the size of a head")
        # Half a dimension more, so that cutting the product with head_dim gives the number itself.
        config["partial_rotary_factor"] = 1.0 if rotary == head_dim else (rotary + 0.5) / head_dim
        if self.arch == "gemma3":
            config["rope_local_base_freq"] = self.file.number(self.key("rope.freq_base_swa"), 10000.0)
        scaling = self._scaling(rotary, context)
        if scaling:
            config["rope_scaling"] = scaling
            config["original_max_position_embeddings"] = scaling.pop("original", context)
        return config

    def _scaling(self, rotary: int, context: int) -> dict[str, Any]:
        """What stretches the rotary embedding, as `rope_scaling`; empty for nothing."""
        factor = self.file.number(self.key("rope.scaling.factor"), 0.0)
        factor = factor or self.file.number(self.key("rope.scale_linear"), 0.0)
        kind = self.file.text(self.key("rope.scaling.type"), "linear" if factor else "none")
        original = self.integer("rope.scaling.original_context_length", MAX_CONTEXT, default=context)
        if self.has("rope_freqs.weight"):
            # How Llama 3 stretches, worked out for each frequency by the converter. It holds for any length.
            return self._divisors("rope_freqs.weight", rotary) | {
                "attention_factor": 1.0,
                "original": context,
            }
        if self.has("rope_factors_short.weight"):
            attention = self.file.number(self.key("rope.scaling.attn_factor"), 1.0)
            divisors = self._divisors("rope_factors_short.weight", rotary)
            return divisors | {"attention_factor": attention, "original": original}
        if kind == "yarn":
            return self._yarn(factor, original)
        if kind == "linear" and factor not in (0.0, 1.0):
            return {"rope_type": "linear", "factor": factor}
        if kind not in ("none", "linear"):
            self.file.refuse(self.key("rope.scaling.type"), "none, linear, yarn, or tensors of factors")
        return {}

    def _divisors(self, name: str, rotary: int) -> dict[str, Any]:
        info = self.file.tensors[name]
        if info.kind.name != "F32" or info.shape != (rotary // 2,):
            found = f"{info.kind.name} {list(info.shape)}"
            raise ModelError(f"{self.file.path}: {name} of {found}", f"F32 [{rotary // 2}]")
        return {"rope_type": "longrope", "short_factor": self.file.read(info).view(np.float32).tolist()}

    def _yarn(self, factor: float, original: int) -> dict[str, Any]:
        for name, wanted in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            if self.file.number(self.key(f"rope.scaling.{name}"), wanted) != wanted:
                self.file.refuse(self.key(f"rope.scaling.{name}"), f"{wanted:g}")
        yarn: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original": original}
        for name, theirs in (
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
            ("attn_factor", "attention_factor"),
        ):
            key = self.key(f"rope.scaling.yarn_{name}")
            if key in self.file.metadata:
                yarn[theirs] = self.file.number(key)
        return yarn

    # --- the rest ----------------------------------------------------------------------------------------

    def _special_tokens(self, vocab_size: int) -> dict[str, Any]:
        # What llama.cpp takes for SentencePiece vocabularies that do not say.
        ids: dict[str, int | None] = {"bos": None, "eos": None, "eot": None, "eom": None}
        if self.file.text("tokenizer.ggml.model", "") == "llama":
            ids |= {"bos": 1, "eos": 2}
        for name in ids:
            found = self.file.optional_integer(f"tokenizer.ggml.{name}_token_id", 0, vocab_size - 1)
            ids[name] = ids[name] if found is None else found
        ends = [token for name in ("eos", "eot", "eom") if (token := ids[name]) is not None]
        ends = list(dict.fromkeys([*ends, *self._ends_of_turn()]))
        return {"bos_token_id": ids["bos"], "eos_token_id": ends or None}

    def _ends_of_turn(self) -> Iterable[int]:
        """Control tokens that are spelt as the end of a turn."""
        tokens, kinds = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
        if tokens not in self.file.metadata or kinds not in self.file.metadata:
            return []
        control = self.file.numbers(kinds) == _CONTROL
        names = self.file.strings(tokens)
        return [i for i in np.flatnonzero(control).tolist() if i < len(names) and names[i] in _ENDS_OF_TURN]

    def _options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        file = self.file
        if self.arch in ("llama", "granite", "qwen3", "qwen3moe", "olmo2", "olmoe"):
            options: dict[str, Any] = {
                "attention_bias": self.has("blk.0.attn_q.bias"),
                "mlp_bias": self.has("blk.0.ffn_up.bias"),
            }
        else:
            options = {}
        window = file.integer(self.key("attention.sliding_window"), 0, MAX_CONTEXT, default=0) or None
        if self.arch in ("gemma2", "gemma3"):
            options |= self._gemma(config, window)
        elif self.arch == "phi3":
            options["sliding_window"] = window
        elif window is not None:
            if self.arch != "llama":
                file.refuse(self.key("attention.sliding_window"), f"0 for {self.arch}")
            options |= {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": window,
            }
        if self.arch == "stablelm":
            options["use_qkv_bias"] = self.has("blk.0.attn_q.bias")
            # As llama.cpp: the converter's flag says true for files in which it is not.
            options["use_parallel_residual"] = not self.has("blk.0.ffn_norm.weight")
            options["qk_layernorm"] = self.has("blk.0.attn_q_norm.weight")
        if self.arch == "granite":
            default = config["head_dim"] ** -0.5
            options |= {
                "attention_multiplier": file.number(self.key("attention.scale"), 0.0) or default,
                "embedding_multiplier": file.number(self.key("embedding_scale"), 0.0) or 1.0,
                "residual_multiplier": file.number(self.key("residual_scale"), 0.0) or 1.0,
                "logits_scaling": file.number(self.key("logit_scale")),
            }
        return options

    def _experts(self, width: int) -> dict[str, Any]:
        """The mixture of experts, if there is one. That weights of the chosen add up to 1 is llama.cpp's rule for each
        architecture; no key says it."""
        if not self.num_experts:
            return {}
        used = self.integer("expert_used_count", min(self.num_experts, MAX_CHOSEN))
        experts: dict[str, Any] = {"num_experts": self.num_experts, "num_experts_per_tok": used}
        if self.arch == "qwen3moe":
            width = self.integer("expert_feed_forward_length", MAX_WIDTH, default=max(width // used, 1))
            return experts | {"moe_intermediate_size": width, "norm_topk_prob": True}
        if self.integer("expert_feed_forward_length", MAX_WIDTH, default=width) != width:
            self.file.refuse(
                self.key("expert_feed_forward_length"), f"the feed_forward_length ({width}) for {self.arch}"
            )
        if self.arch == "olmoe":
            return experts | {"norm_topk_prob": False}
        return experts | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}

    def _gemma(self, config: Mapping[str, Any], window: int | None) -> dict[str, Any]:
        layers = config["num_hidden_layers"]
        scaled = config["head_dim"]
        if layers == _WIDTH_SCALED[self.arch]:
            scaled = config["hidden_size"] // config["num_attention_heads"]
        if self.arch == "gemma2" and window is None:
            window = 4096
        options: dict[str, Any] = {
            "query_pre_attn_scalar": scaled,
            "sliding_window": window,
            "layer_types": self._layer_types(layers),
            "final_logit_softcapping": self.file.optional_number(self.key("final_logit_softcapping")),
        }
        if self.arch == "gemma2":
            cap = self.file.optional_number(self.key("attn_logit_softcapping"))
            options["attn_logit_softcapping"] = 50.0 if cap is None else cap
            if options["final_logit_softcapping"] is None:
                options["final_logit_softcapping"] = 30.0
        return options

    def _layer_types(self, layers: int) -> list[str]:
        """A period (its last layer sees all), or a flag for each layer."""
        key = self.key("attention.sliding_window_pattern")
        if isinstance(self.file.metadata.get(key), Array):
            flags = self.file.numbers(key).tolist()
            if len(flags) != layers:
                self.file.refuse(key, f"a flag for each of the {layers} layers")
        else:
            period = self.file.integer(key, 1, MAX_LAYERS, default=_WINDOW_PERIODS[self.arch])
            flags = [(layer + 1) % period for layer in range(layers)]
        return ["sliding_attention" if flag else "full_attention" for flag in flags]
