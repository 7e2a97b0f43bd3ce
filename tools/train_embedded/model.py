"""A small Llama in plain torch with fused projections, and its exchange with the Hugging Face format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from .tokenizer import BOS, END, PAD, VOCAB_SIZE


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; everything that is not here is fixed (tied embeddings, no biases)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = VOCAB_SIZE
    context: int = 1024
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


TARGET = ModelConfig(hidden=256, layers=5, heads=4, kv_heads=2, ffn=704)
DRAFT = ModelConfig(hidden=64, layers=3, heads=2, kv_heads=1, ffn=256)
QUERY_BLOCK = 128
FIXED = ("model_type", "head_dim", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings")


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and signed sin tables [context, head_dim] in Hugging Face's half-split order."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(config.context).float(), config.theta**-exponents)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal grouped-query attention; query [B, G, R, T, D], key and value [B, G, T, D].

    Blocks of queries meet only the keys up to their own block, and the R query heads of one key head share
    its matrix products: on a CPU this is about twice as fast as torch's fused kernel at these sizes.
    """
    batch, groups, repeat, length, width = query.shape
    size = min(QUERY_BLOCK, length)
    mask = torch.full((size, size), float("-inf"), dtype=query.dtype).triu(1)
    parts = []
    for start in range(0, length, size):
        rows = query[:, :, :, start : start + size]
        count = rows.shape[3]
        rows = (rows * width**-0.5).reshape(batch, groups, repeat * count, width)
        scores = torch.matmul(rows, key[:, :, : start + count].transpose(-1, -2))
        scores = scores.view(batch, groups, repeat, count, start + count)
        scores = torch.cat([scores[..., :start], scores[..., start:] + mask[:count, :count]], -1)
        shares = torch.softmax(scores, -1).view(batch, groups, repeat * count, start + count)
        mixed = torch.matmul(shares, value[:, :, : start + count])
        parts.append(mixed.view(batch, groups, repeat, count, width))
    return torch.cat(parts, 3)


class Block(nn.Module):
    """One decoder layer; ``qkv`` and ``gate_up`` are fused projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.norm1 = nn.Parameter(torch.ones(config.hidden))
        self.norm2 = nn.Parameter(torch.ones(config.hidden))
        self.qkv = nn.Linear(config.hidden, width, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        self.gate_up = nn.Linear(config.hidden, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden], causal."""
        c = self.config
        batch, length, _ = x.shape
        half = c.head_dim // 2
        mixed = self.qkv(functional.rms_norm(x, (c.hidden,), self.norm1, c.eps))
        mixed = mixed.view(batch, length, c.heads + 2 * c.kv_heads, c.head_dim)
        turned = mixed[:, :, : c.heads + c.kv_heads]
        swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
        turned = turned * cos + swapped * sin
        query = turned[:, :, : c.heads].view(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        key, value = (
            turned[:, :, c.heads :].transpose(1, 2),
            mixed[:, :, c.heads + c.kv_heads :].transpose(1, 2),
        )
        mixed = attend(query.permute(0, 2, 3, 1, 4), key, value).permute(0, 3, 1, 2, 4)
        x = x + self.out(mixed.reshape(batch, length, c.heads * c.head_dim))
        gate, up = self.gate_up(functional.rms_norm(x, (c.hidden,), self.norm2, c.eps)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Llama(nn.Module):
    """Llama without a head of its own: ``forward`` gives the final hidden states, ``embed`` is tied."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab, config.hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        cos, sin = rope_tables(config)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    scale = 0.02 / (2 * config.layers) ** 0.5 if ".out." in name or ".down." in name else 0.02
                    parameter.normal_(0.0, scale, generator=generator)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Final normalised hidden states [B, T, hidden] computed in ``dtype``."""
        length = ids.shape[1]
        cos, sin = self.cos[:length, None].to(dtype), self.sin[:length, None].to(dtype)
        x = functional.embedding(ids, self.embed).to(dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return functional.rms_norm(x, (self.config.hidden,), self.norm.to(x.dtype), self.config.eps)

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token logits [B, T, vocab] in fp32."""
        return functional.linear(self.forward(ids), self.embed)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; the tied embedding counts once."""
    return sum(parameter.numel() for parameter in Llama(config).parameters())


def _views(model: Llama) -> dict[str, Tensor]:
    """Views of the weights under Hugging Face's names, projections split."""
    c = model.config
    state = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"model.layers.{index}."
        for name, part in zip("qkv", block.qkv.weight.split(sizes), strict=True):
            state[f"{prefix}self_attn.{name}_proj.weight"] = part
        gate, up = block.gate_up.weight.chunk(2)
        state[prefix + "self_attn.o_proj.weight"] = block.out.weight
        state[prefix + "mlp.gate_proj.weight"], state[prefix + "mlp.up_proj.weight"] = gate, up
        state[prefix + "mlp.down_proj.weight"] = block.down.weight
        state[prefix + "input_layernorm.weight"] = block.norm1
        state[prefix + "post_attention_layernorm.weight"] = block.norm2
    return state


def hf_state(model: Llama) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, bf16."""
    return {name: view.detach().to(torch.bfloat16).contiguous() for name, view in _views(model).items()}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def read_hf(folder: Path) -> Llama:
    """The model of a folder in Hugging Face format, fp32. ValueError names what this Llama has not."""
    found = json.loads((folder / "config.json").read_text())
    try:
        config = ModelConfig(
            hidden=found["hidden_size"],
            layers=found["num_hidden_layers"],
            heads=found["num_attention_heads"],
            kv_heads=found["num_key_value_heads"],
            ffn=found["intermediate_size"],
            vocab=found["vocab_size"],
            context=found["max_position_embeddings"],
            theta=found["rope_theta"],
            eps=found["rms_norm_eps"],
        )
    except KeyError as missing:
        raise ValueError(f"{folder}/config.json has no {missing}") from None
    wanted = hf_config(config)
    for name in FIXED:
        if name in found and found[name] != wanted[name]:
            raise ValueError(
                f"{folder}/config.json: {name} is {found[name]}; only {wanted[name]} is supported"
            )
    if found.get("rope_scaling"):
        raise ValueError(f"{folder}/config.json: rope_scaling is not supported")
    model, state = Llama(config), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, view in _views(model).items():
            view.copy_(state[name])
    return model


def generation_config() -> dict[str, Any]:
    """The contents of generation_config.json."""
    return {
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }


def write_hf(model: Llama, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16)."""
    for name, content in (
        ("config.json", hf_config(model.config)),
        ("generation_config.json", generation_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = folder / "model.safetensors"
    save_file(hf_state(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
