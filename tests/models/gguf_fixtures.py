"""GGUF files of small random models of transformers, written with the `gguf` package as llama.cpp's converter does.

Names come from the package's own map; what the converter turns, shifts or interleaves is done here in its words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")
torch = pytest.importorskip("torch", reason="torch is the oracle here")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

Types = Callable[[str, tuple[int, ...]], str]
"""The type of a tensor by its GGUF name and shape."""

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
# Bytes of the scales of a block, and what to write there so that values are about as large as weights.
_BLOCK_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_K": ((0, 0.0008), (2, 0.006)),
    "Q5_K": ((0, 0.0004), (2, 0.006)),
    "Q6_K": ((208, 0.00009),),
}


def random_model(kind: str, options: Mapping[str, Any], seed: int = 0) -> Any:
    """A model of transformers, its norms and biases shaken out of their ones and zeros."""
    names = {"Gemma3": "Gemma3TextConfig"}
    config = getattr(transformers, names.get(kind, f"{kind}Config"))(**(SMALL | dict(options)))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    architecture = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def all_float32(name: str, shape: tuple[int, ...]) -> str:
    return "F32"


def encode(values: NDArray[np.float32], kind: str, rng: np.random.Generator) -> NDArray[Any]:
    """`values` [..., K] in blocks of `kind`: rounded, or random ones for K-quants, which the package cannot make."""
    if kind == "F32":
        return values
    if kind == "F16":
        return values.astype(np.float16)
    number = gguf.GGMLQuantizationType[kind]
    if kind not in K_QUANTS:
        encoded: NDArray[Any] = gguf.quants.quantize(values, number)
        return encoded
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8)
    for offset, scale in _BLOCK_SCALES[kind]:
        data[..., offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return data.reshape(*values.shape[:-1], -1)


def decode(data: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """The float32 values of encoded data."""
    if kind in ("F32", "F16"):
        return data.astype(np.float32)
    values: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values


def write_gguf(
    path: Path,
    model: Any,
    types: Types = all_float32,
    *,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Callable[[Any], None] | None = None,
) -> dict[str, str]:
    """Write `model`, whose weights become those of the file where these are rounded; returns the types by name."""
    config = model.config
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), arch)
    _write_metadata(writer, arch, config)
    (tokenizer or plain_tokenizer)(writer)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    rng = np.random.default_rng(1)
    written: dict[str, str] = {}
    with torch.no_grad():
        for key, parameter in _parts(model):
            name = names.get_name(key, (".weight", ".bias"))
            values = _as_converted(arch, key, parameter.numpy().copy(), config)
            kind = written[name] = types(name, values.shape) if values.ndim > 1 else "F32"
            data = encode(values, kind, rng)
            raw = None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, data, raw_dtype=raw)
            if kind != "F32":
                kept = _as_loaded(arch, key, decode(data, kind), config)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(kept)))
    for name, values in _rope_tensors(config).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters by the names of checkpoints; gate and up of experts apart, each a view."""
    for key, parameter in model.named_parameters():
        if key.endswith(".experts.gate_up_proj"):
            for name, half in zip(("gate_proj", "up_proj"), parameter.chunk(2, dim=1), strict=True):
                yield key.replace("gate_up_proj", f"{name}.weight"), half
        else:
            yield key + ".weight" * key.endswith(".experts.down_proj"), parameter


def plain_tokenizer(writer: Any) -> None:
    """A SentencePiece vocabulary of `VOCAB` pieces without much in it."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<unk>", "<s>", "</s>", "▁", *letters]
    tokens += [f"<0x{byte:02X}>" for byte in range(32, 32 + VOCAB - len(tokens))]
    kinds = [2, 3, 3, *[1] * 27]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types(kinds + [6] * (VOCAB - len(kinds)))


def _write_metadata(writer: Any, arch: str, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    _write_experts(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    rotary = int(head_dim * full.get("partial_rotary_factor", 1.0))
    if arch == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(True)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch in ("llama", "granite", "stablelm", "phi3"):
        writer.add_rope_dimension_count(rotary)
    if arch not in ("gemma2", "stablelm"):
        writer.add_rope_freq_base(full["rope_theta"])
    if head_dim != config.hidden_size // heads or arch in ("gemma2", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _write_scaling(writer, config, full)


def _write_experts(writer: Any, config: Any) -> None:
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _write_scaling(writer: Any, config: Any, rope: Mapping[str, Any]) -> None:
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))


def _rope_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    rope = config.rope_parameters if config.model_type != "gpt2" else {"rope_type": "default"}
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def _heads_of(key: str, config: Any) -> int:
    """How many heads' rows a tensor has that llama.cpp wants interleaved; 0 for others."""
    if ".q_proj." in key:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in key else 0


def _as_converted(arch: str, key: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    heads = _heads_of(key, config) if arch in ("llama", "granite") else 0
    if heads:
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if arch in ("gemma2", "gemma3") and key.endswith("norm.weight"):
        return values + np.float32(1)
    if arch == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(values.T)
    return values


def _as_loaded(arch: str, key: str, values: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    heads = _heads_of(key, config) if arch in ("llama", "granite") else 0
    if heads:
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values.T if arch == "gpt2" and ".c_" in key else values
