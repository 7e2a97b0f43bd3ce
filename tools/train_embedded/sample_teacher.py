"""Bulk sampling of TinyStories-like text from the stories3M checkpoint (plain torch, batched KV cache)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from . import words
from .words import with_article

BOS, EOS = 1, 2
MAX_TOKENS = 480


def opening(rng: random.Random) -> str:
    """One story opening that names two or more random nouns early."""
    pick = rng.choice
    animal, person, thing, place = (
        pick(words.ANIMALS),
        pick(words.PEOPLE),
        pick(words.THINGS),
        pick(words.PLACES),
    )
    other, adjective, second = pick(words.ANIMALS), pick(words.ADJECTIVES), pick(words.ADJECTIVES)
    nature, name, item = pick(words.NATURE), pick(words.NAMES), pick(words.THINGS)
    place = place.replace("-", " ")
    hero = pick((animal, person, f"{second} {animal}", f"{second} {person}", "little boy", "little girl"))
    held = pick((thing, f"{adjective} {thing}"))
    forms = (
        f"Once upon a time, there was {with_article(hero)} who had {with_article(held)}.",
        f"Once upon a time, there was {with_article(hero)} named {name}. {name} had {with_article(held)}.",
        f"Once upon a time, {with_article(hero)} found {with_article(held)} in the {place}.",
        f"One day, {with_article(hero)} found {with_article(held)} near the {place}.",
        f"Once upon a time, in a {adjective} {place}, there lived {with_article(hero)}."
        f" The {hero.split()[-1]} loved",
        f"{name} was {with_article(hero)} who liked to play with {with_article(held)}.",
        f"Once there was {with_article(hero)} and {with_article(other)}. They lived near the {place}.",
        f"One day, {name} and the {animal} went to the {place}. They saw {with_article(held)}.",
        f"{name} had {with_article(held)} and {with_article(item)}. One day, {with_article(animal)}",
        f"Once upon a time, there was {with_article(held)}."
        f" It lived in the {place} with {with_article(animal)}.",
        f"Once upon a time, there was {with_article(animal)} who loved the {nature}."
        f" The {animal} had a friend, {with_article(other)}.",
        f"One day, {name} saw {with_article(held)} on the {item}.",
        f"Once upon a time, there was a {adjective} {thing} and a {second} {item}.",
        f"{name} wanted {with_article(held)}. But the {animal}",
    )
    return pick(forms)


def prefix_for(seed: int, index: int, stories: list[str]) -> str:
    """The opening of sampled story ``index``: a noun template, a real story's opening, or nothing."""
    rng = random.Random(f"prefix-{seed}-{index}")
    draw = rng.random()
    if draw < 0.6:
        return opening(rng)
    if draw < 0.92:
        sentences = rng.choice(stories).split("\n")[0].split(". ")
        return ". ".join(sentences[: rng.choice((1, 1, 2))]).rstrip(".") + "."
    return ""


class Teacher:
    """stories3M with a KV cache for sequences that all stand at the same position."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.head_dim = config["hidden_size"] // self.heads
        weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        self.dtype, self.embed, self.norm = (
            dtype,
            weights["model.embed_tokens.weight"],
            weights["model.norm.weight"],
        )
        self.blocks = []
        for layer in range(self.layers):
            w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f"layers.{layer}." in k}
            qkv = torch.cat([w[f"self_attn.{p}_proj.weight"] for p in "qkv"])
            up = torch.cat([w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]])
            self.blocks.append(
                (
                    w["input_layernorm.weight"],
                    qkv,
                    w["self_attn.o_proj.weight"],
                    w["post_attention_layernorm.weight"],
                    up,
                    w["mlp.down_proj.weight"],
                )
            )
        angles = torch.outer(
            torch.arange(MAX_TOKENS + 1).float(),
            config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim),
        )
        self.cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        self.sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)

    def cache(self, batch: int) -> list[torch.Tensor]:
        """Keys transposed [B, KV, D, T] and values [B, KV, T, D] for each layer in turn."""
        out = []
        for _ in range(self.layers):
            out.append(torch.zeros(batch, self.kv_heads, MAX_TOKENS, self.head_dim, dtype=self.dtype))
            out.append(torch.zeros(batch, self.kv_heads, MAX_TOKENS, self.head_dim, dtype=self.dtype))
        return out

    def step(self, ids: torch.Tensor, cache: list[torch.Tensor], position: int) -> torch.Tensor:
        """Logits [B, V] (fp32) after one token per sequence; writes the cache at ``position``."""
        batch, hd = ids.shape[0], self.head_dim
        hidden = functional.embedding(ids, self.embed)
        half = hd // 2
        for layer, (norm1, qkv, out, norm2, up, down) in enumerate(self.blocks):
            mixed = functional.linear(functional.rms_norm(hidden, norm1.shape, norm1, self.eps), qkv)
            mixed = mixed.view(batch, self.heads + 2 * self.kv_heads, hd)
            rotated = mixed[:, : self.heads + self.kv_heads]
            swapped = torch.cat([rotated[..., half:], rotated[..., :half]], -1)
            rotated = rotated * self.cos[position] + swapped * self.sin[position]
            keys, values = cache[2 * layer], cache[2 * layer + 1]
            keys[:, :, position] = rotated[:, self.heads :]
            values[:, :, position] = mixed[:, self.heads + self.kv_heads :]
            query = rotated[:, : self.heads].view(batch, self.kv_heads, self.heads // self.kv_heads, hd)
            attended = functional.scaled_dot_product_attention(
                query, keys[:, :, : position + 1], values[:, :, : position + 1]
            )
            hidden = hidden + functional.linear(attended.reshape(batch, -1), out)
            normed = functional.rms_norm(hidden, norm2.shape, norm2, self.eps)
            gate, value = functional.linear(normed, up).chunk(2, -1)
            hidden = hidden + functional.linear(functional.silu(gate) * value, down)
        hidden = functional.rms_norm(hidden, self.norm.shape, self.norm, self.eps)
        return functional.linear(hidden, self.embed).float()


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row from softmax(logits / temperature), by inverting the cumulative sum."""
    total = torch.softmax(logits / temperature, -1).cumsum_(-1)
    uniform = torch.rand(logits.shape[0], 1, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, uniform).squeeze(-1).clamp_(max=logits.shape[1] - 1)


@torch.inference_mode()
def sample_batch(
    teacher: Teacher, prompts: list[list[int]], temperature: float, seed: int
) -> list[list[int] | None]:
    """Continue every prompt to its end-of-story token; None for a story that does not end in time.

    A result holds the ids of the prompt too, without its first one. Ends inside of a prompt (of the turns of a chat)
    end nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(len(prompt) for prompt in prompts)
    forced = torch.full((len(prompts), width), -1)
    for row, prompt in enumerate(prompts):
        forced[row, : len(prompt)] = torch.tensor(prompt)
    done: list[list[int] | None] = [None] * len(prompts)
    alive = torch.arange(len(prompts))
    history = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.long)
    history[:, 0] = forced[:, 0]
    cache = teacher.cache(len(prompts))
    active = torch.ones(len(prompts), dtype=torch.bool)
    for position in range(MAX_TOKENS - 1):
        token = _draw(teacher.step(history[:, position], cache, position), temperature, generator)
        ended = active & ((token == BOS) | (token == EOS))
        if position + 1 < width:
            given = forced[:, position + 1]
            ended &= given < 0
            token = torch.where(given >= 0, given, token)
        history[:, position + 1] = token
        for row in ended.nonzero().flatten().tolist():
            done[int(alive[row])] = history[row, 1 : position + 1].tolist()
        active &= ~ended
        living = int(active.sum())
        if living < 0.04 * len(prompts):
            break
        if living < 0.85 * len(alive):
            keep = active.nonzero().flatten()
            alive, history, forced, active = alive[keep], history[keep], forced[keep], active[keep]
            cache = [_compact(tensor, keep, position + 1) for tensor in cache]
    return done


def _compact(tensor: torch.Tensor, keep: torch.Tensor, length: int) -> torch.Tensor:
    """Keep the rows ``keep`` (ascending) in place; only the first ``length`` positions matter."""
    tensor[: len(keep), :, :length] = tensor[keep, :, :length]
    return tensor[: len(keep)]


def _finished(folder: Path) -> tuple[int, int]:
    """(next batch number, tokens so far) from the files already there."""
    tokens = 0
    number = 0
    while (path := folder / f"samples-{number:05d}.jsonl").exists():
        with path.open(encoding="utf-8") as stream:
            tokens += json.loads(stream.readline())["tokens"]
        number += 1
    return number, tokens


def read_samples(folder: Path) -> Iterator[str]:
    """All sampled stories, in order. Each file starts with one record of its token count."""
    for path in sorted(folder.glob("samples-*.jsonl")):
        with path.open(encoding="utf-8") as stream:
            next(stream)
            for line in stream:
                yield json.loads(line)["text"]


def run(
    data: Path, work: Path, stories: list[str], tokens: int, batch: int, temperature: float, seed: int
) -> None:
    """Sample until ``tokens`` teacher tokens are there. Restartable: a whole batch is one atomic file."""
    folder = work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    number, total = _finished(folder)
    if total >= tokens:
        return
    model = data / "models" / "hf" / "stories3M"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    teacher = Teacher(model, torch.bfloat16)
    while total < tokens:
        start = time.perf_counter()
        prefixes = [prefix_for(seed, number * batch + row, stories) for row in range(batch)]
        prompts = [
            [BOS, *[i for i in tokenizer.encode(p, add_special_tokens=False).ids if i not in (BOS, EOS)][:80]]
            if p
            else [BOS]
            for p in prefixes
        ]
        results = [ids for ids in sample_batch(teacher, prompts, temperature, seed * 100003 + number) if ids]
        count = sum(len(ids) + 1 for ids in results)
        part = folder / "part.tmp"
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"tokens": count, "stories": len(results)}) + "\n")
            for ids in results:
                stream.write(json.dumps({"text": tokenizer.decode(ids).strip()}, ensure_ascii=False) + "\n")
        part.replace(folder / f"samples-{number:05d}.jsonl")
        total += count
        number += 1
        speed = count / (time.perf_counter() - start)
        print(
            f"batch {number}: {len(results)}/{batch} stories, {total} tokens, {speed:.0f} tokens/s",
            flush=True,
        )
