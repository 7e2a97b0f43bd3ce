"""Sound files for `fuzz_files` to bend: configurations, tokenizers, checkpoints and GGUF files of a few kilobytes."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tokenloom.models.hf_config import parse_config
from tokenloom.models.registry import FAMILIES, build_program

Files = dict[str, bytes]

VOCAB = 300
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": 64},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "stablelm": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "gpt2": {"n_inner": 64, "activation_function": "gelu_new"},
    "opt": {
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None},
}
_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
}
_QUANTIZED: tuple[dict[str, Any], ...] = (
    {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "modules_to_not_convert": ["k_proj"],
    },
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    {"quant_method": "fp8", "weight_block_size": [16, 32], "modules_to_not_convert": ["lm_head"]},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": _GROUP},
        "ignore": ["lm_head", "re:.*k_proj"],
    },
)
_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
)
CHAT_TEMPLATE = (
    "{%- for m in messages %}{% if loop.first and m.role == 'system' %}<sys>{{ m.content | trim }}{% else %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}{{ 'go' if add_generation_prompt }}"
)


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json of a small model."""
    family = FAMILIES[model_type]
    config = BASE | {"model_type": model_type, "architectures": [family.architecture]}
    config |= {theirs: config[name] for name, theirs in family.names.items() if name in config}
    return config | _OWN.get(model_type, {}) | changes


def configs() -> list[Files]:
    """Every family, method of quantisation and scaling."""
    written = [config_of(model_type) for model_type in FAMILIES]
    written += [config_of("llama", quantization_config=method) for method in _QUANTIZED]
    written += [config_of("llama", rope_scaling=scaling) for scaling in _SCALINGS[:3]]
    written.append(config_of("phi3", rope_scaling=_SCALINGS[3]))
    generation = {"eos_token_id": [2, 3], "temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": True}
    return [_json_files({"config.json": config, "generation_config.json": generation}) for config in written]


def _json_files(objects: Mapping[str, Any]) -> Files:
    return {name: json.dumps(value).encode() for name, value in objects.items()}


# --- tokenizers --------------------------------------------------------------------------------------------


def _byte_vocabulary() -> dict[str, int]:
    return {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _byte_level() -> tokenizers.Tokenizer:
    vocab = _byte_vocabulary() | {"he": 256, "ll": 257, "hell": 258, "hello": 259}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pattern = tokenizers.Regex(r"'s|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\t", " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def _pieces() -> tokenizers.Tokenizer:
    """As SentencePiece's: spaces are ▁, unknown bytes are pieces."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {piece: 259 + i for i, piece in enumerate(("▁", "h", "i", "▁h", "▁hi"))}
    model = models.BPE(
        vocab=vocab, merges=[("▁", "h"), ("▁h", "i")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _other_models() -> list[tokenizers.Tokenizer]:
    unigram = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)], unk_id=0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    words = {"[UNK]": 0, "a": 1, "##b": 2, "[CLS]": 3, "[SEP]": 4}
    wordpiece = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    return [unigram, wordpiece]


def _proto(number: int, value: int | bytes | float) -> bytes:
    """One field of a protocol-buffer message."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _sentencepiece() -> bytes:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [(piece, -float(i), 1) for i, piece in enumerate(("▁h", "▁hi", "▁", "h", "i"))]
    message = b"".join(
        _proto(1, _proto(1, text.encode()) + _proto(2, score) + _proto(3, kind))
        for text, score, kind in pieces
    )
    return message + _proto(2, _proto(3, 2) + _proto(35, 1)) + _proto(3, _proto(3, 1) + _proto(5, 1))


def tokenizer_directories() -> list[Files]:
    """Every form in which a tokenizer may come."""
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": None}
    config = named | {
        "add_bos_token": True,
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "LlamaTokenizer",
    }
    config["added_tokens_decoder"] = {"260": {"content": "<s>", "special": True, "lstrip": False}}
    several = named | {"chat_template": [{"name": "default", "template": CHAT_TEMPLATE}]}
    found = [
        _json_files({"tokenizer_config.json": config, "special_tokens_map.json": named})
        | {"tokenizer.json": _byte_level().to_str().encode()},
        _json_files({"tokenizer_config.json": several}) | {"tokenizer.json": _pieces().to_str().encode()},
        _json_files({"tokenizer_config.json": config | {"added_tokens_decoder": {}}})
        | {"tokenizer.model": _sentencepiece(), "chat_template.jinja": CHAT_TEMPLATE.encode()},
    ]
    found += [{"tokenizer.json": backend.to_str().encode()} for backend in _other_models()]
    gpt2 = {
        "vocab.json": _byte_vocabulary() | {"he": 256},
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
    }
    found.append(_json_files(gpt2) | {"merges.txt": b"#version: 0.2\nh e\n"})
    ranks = (
        b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
        + base64.b64encode(b"he")
        + b" 256\n"
    )
    qwen = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}
    qwen["added_tokens_decoder"] = {"257": {"content": "<|eot_id|>", "special": True}}  # type: ignore[assignment]
    return [
        *found,
        _json_files({"tokenizer_config.json": qwen, "config.json": {"model_type": "llama"}})
        | {"tokenizer.model": ranks},
    ]


# --- checkpoints -------------------------------------------------------------------------------------------

_TYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint8": "F8_E4M3"}


def _tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors for the program of `config`."""
    rng = np.random.default_rng(seed)
    specs = build_program(parse_config(config)).weights
    found: dict[str, np.ndarray] = {}
    for spec in specs:
        rows = spec.shape[0] // len(spec.sources)
        if len(spec.sources) == 3:
            q, kv = config["num_attention_heads"], config["num_key_value_heads"]
            sizes = [spec.shape[0] * part // (q + 2 * kv) for part in (q, kv, kv)]
        else:
            sizes = [rows] * len(spec.sources)
        for name, size in zip(spec.sources, sizes, strict=True):
            values = rng.standard_normal((size, *spec.shape[1:]), np.float32) * 0.1
            found[name] = np.ascontiguousarray(values.T) if spec.transposed else values
    return found


def safetensors_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _TYPES[tensor.dtype.name], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values())


def _quantized(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The linears of a Llama as its `quantization_config` says, of random numbers."""
    rng = np.random.default_rng(1)
    method = config["quantization_config"]["quant_method"]
    found: dict[str, np.ndarray] = {}
    for name, tensor in _tensors(config).items():
        module = name.removesuffix(".weight")
        left = config["quantization_config"].get("modules_to_not_convert", [])
        if not name.endswith("_proj.weight") or any(skipped in name for skipped in left):
            found[name] = tensor
            continue
        rows, depth = tensor.shape
        words = rng.integers(-(1 << 31), 1 << 31, rows * depth // 8, np.int64).astype(np.int32)
        groups = depth // 32
        scales = rng.uniform(0.001, 0.01, (groups, rows)).astype(np.float16)
        zeros = np.full((groups, rows // 8), 0x77777777, np.int32)
        if method == "awq":
            found |= {f"{module}.qweight": words.reshape(depth, rows // 8)}
        elif method == "gptq":
            found |= {f"{module}.qweight": words.reshape(depth // 8, rows)}
            found |= {f"{module}.g_idx": np.arange(depth, dtype=np.int32)[::-1].copy() // 32}
        else:
            blocks = (-(-rows // 16), -(-depth // 32))
            found |= {name: rng.integers(0, 120, (rows, depth)).astype(np.uint8)}
            found |= {f"{module}.weight_scale_inv": rng.uniform(0.001, 0.01, blocks).astype(np.float32)}
            continue
        found |= {f"{module}.qzeros": zeros, f"{module}.scales": scales}
    return found


def checkpoints() -> list[Files]:
    """Directories of safetensors: whole, in shards, of several families, quantised."""
    found = []
    for model_type in ("llama", "gpt2", "mixtral", "gemma2"):
        config = config_of(model_type)
        files = {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": safetensors_file(_tensors(config)),
        }
        found.append(files)
    for method in _QUANTIZED[:3]:
        config = config_of("llama", quantization_config=method)
        files = {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": safetensors_file(_quantized(config)),
        }
        found.append(files)
    config = config_of("llama", tie_word_embeddings=True)
    tensors = {name: tensor.astype(np.float16) for name, tensor in _tensors(config).items()}
    names = list(tensors)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    found.append(
        _json_files({"config.json": config, "model.safetensors.index.json": index})
        | {file: safetensors_file({name: tensors[name] for name in part}) for file, part in shards.items()}
    )
    return found


# --- GGUF --------------------------------------------------------------------------------------------------

UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
_ROW_BYTES = {
    F32: lambda k: 4 * k,
    F16: lambda k: 2 * k,
    Q4_0: lambda k: k // 32 * 18,
    Q8_0: lambda k: k // 32 * 34,
}


@dataclass
class Gguf:
    """A GGUF file in parts: (key, type, bytes of the value), (name, dimensions, type, offset), and the numbers."""

    entries: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    tensors: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)
    data: bytes = b""
    version: int = 3

    def dump(self, entries: int = 0, tensors: int = 0) -> bytes:
        """The file; its counts are off by `entries` and `tensors`."""
        counts = (len(self.tensors) + tensors) % (1 << 64), (len(self.entries) + entries) % (1 << 64)
        out = [b"GGUF", struct.pack("<IQQ", self.version, *counts)]
        for key, kind, value in self.entries:
            out += [text_of(key), struct.pack("<I", kind), value]
        for name, dims, kind, offset in self.tensors:
            out += [
                text_of(name),
                struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
                struct.pack("<IQ", kind, offset),
            ]
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.data


def text_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entry(key: str, value: int | float | str | list[Any]) -> tuple[bytes, int, bytes]:
    if isinstance(value, list):
        kind, items = STRING, b"".join(_entry("", item)[2] for item in value)
        if value and not isinstance(value[0], str):
            kind = FLOAT32 if isinstance(value[0], float) else INT32
        return key.encode(), ARRAY, struct.pack("<IQ", kind, len(value)) + items
    if isinstance(value, str):
        return key.encode(), STRING, text_of(value.encode())
    if isinstance(value, float):
        return key.encode(), FLOAT32, struct.pack("<f", value)
    return key.encode(), UINT32, struct.pack("<I", value)


def _gguf(arch: str, kind: int, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Gguf:
    """`shapes` with rows last; matrices are of type `kind`."""
    common = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "▁h", "▁hi"]
    tokenizer = {
        "model": "llama", "tokens": pieces, "scores": [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * 5], "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    entries = [_entry("general.architecture", arch)]
    entries += [_entry(f"{arch}.{key}", value) for key, value in (common | dict(metadata)).items()]
    entries += [_entry(f"tokenizer.ggml.{key}", value) for key, value in tokenizer.items()]
    entries += [_entry("tokenizer.chat_template", CHAT_TEMPLATE), _entry("general.sampling.temp", 0.7)]
    rng = np.random.default_rng(0)
    file = Gguf(entries)
    outer = {"token_embd.weight": (VOCAB, 32), "output_norm.weight": (32,), "output.weight": (VOCAB, 32)}
    for name, shape in (outer | dict(shapes)).items():
        stored = kind if len(shape) > 1 and "ffn_gate_inp" not in name else F32
        rows, row = int(np.prod(shape[:-1])), _ROW_BYTES[stored](shape[-1])
        if stored in (F32, F16):
            values = rng.standard_normal(shape) * 0.1
            data = values.astype(np.float32 if stored == F32 else np.float16).tobytes()
        else:
            blocks = rng.integers(0, 256, (rows * shape[-1] // 32, row // (shape[-1] // 32)), np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            data = blocks.tobytes()
        file.tensors.append((name.encode(), list(shape[::-1]), stored, len(file.data)))
        file.data += data + bytes(-len(data) % 32)
    return file


def gguf_files() -> list[Gguf]:
    """A Llama in three types, a mixture of experts, and a Gemma with windows."""
    attention = {
        "blk.0.attn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_norm.weight": (32,),
    }  # fmt: skip
    mlp = {
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    experts = {
        "blk.0.ffn_gate_inp.weight": (4, 32), "blk.0.ffn_gate_exps.weight": (4, 64, 32),
        "blk.0.ffn_up_exps.weight": (4, 64, 32), "blk.0.ffn_down_exps.weight": (4, 32, 64),
    }  # fmt: skip
    heads = {"blk.0.attn_q_norm.weight": (8,), "blk.0.attn_k_norm.weight": (8,)}
    posts = {"blk.0.post_attention_norm.weight": (32,), "blk.0.post_ffw_norm.weight": (32,)}
    mixture = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    gemma = {"attention.sliding_window": 16, "attention.sliding_window_pattern": 1, "rope.freq_base": 1e6}
    gemma |= {"attention.key_length": 8, "attention.value_length": 8}
    return [
        *(_gguf("llama", kind, {"rope.freq_base": 1e4}, attention | mlp) for kind in (F32, F16, Q4_0, Q8_0)),
        _gguf("llama", Q4_0, {"expert_count": 4, "expert_used_count": 2}, attention | experts),
        _gguf("qwen3moe", Q8_0, mixture, attention | experts | heads),
        _gguf("gemma3", F16, gemma, attention | mlp | heads | posts),
    ]
