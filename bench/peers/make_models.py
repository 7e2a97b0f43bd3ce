"""Random-weight models (bf16, Hugging Face format) with a small BPE tokenizer: Llama in the sizes S, M and L, and
E, a mixture of experts.

    python make_models.py --out DIR [--only S,M,L]

Speed does not depend on what the weights are, so random ones serve to compare engines, and nothing has to be
downloaded. The seed is fixed: two machines make the same models. Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPES: dict[str, dict[str, int | float]] = {
    "S": {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 32_000,
        "rope_theta": 10_000.0,
    },
    "M": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
        "rope_theta": 1_000_000.0,
    },
    "L": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
    },
    # Experts: 1.08 B parameters, of which a token uses 0.18 B.
    "E": {
        "hidden_size": 1024,
        "moe_intermediate_size": 256,
        "intermediate_size": 4096,
        "num_experts": 80,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
        "rope_theta": 1_000_000.0,
    },
}
LEARNT_TOKENS = 16_000


def train_tokenizer(cache: Path) -> str:
    """A byte-level BPE trained on the Python standard library, as JSON; kept in `cache`."""
    if not cache.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=LEARNT_TOKENS,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train(
            [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))], trainer
        )
        tokenizer.save(str(cache))
    return cache.read_text(encoding="utf-8")


def pad_vocabulary(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with dummy tokens up to `vocab_size`, so that any id a random model picks has a text."""
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    for token_id in range(len(vocab), vocab_size):
        vocab[f"xx{token_id}"] = token_id
    padded = Tokenizer.from_str(json.dumps(content))
    if padded.get_vocab_size() != vocab_size:
        raise RuntimeError(f"the vocabulary has {padded.get_vocab_size()} tokens, not {vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=padded, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(name: str, out: Path) -> None:
    """Write the model `name` to `out/name`."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config, kind = (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM) if "num_experts" in shape else (LlamaConfig, LlamaForCausalLM)
    )
    model = kind(
        config(
            **shape,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            attention_bias=False,
            initializer_range=0.02,
        )
    ).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(out / name)
    pad_vocabulary(train_tokenizer(out / "tokenizer.json"), int(shape["vocab_size"])).save_pretrained(
        out / name
    )
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the models")
    parser.add_argument("--only", default="S,M,L", help="which models")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        make_model(name, args.out)


if __name__ == "__main__":
    main()
