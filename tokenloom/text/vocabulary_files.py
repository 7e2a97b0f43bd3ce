"""Tokenizers of directories without a tokenizer.json: tokenizer.model, or vocab.json with merges.txt.

`tokenizer.model` is a SentencePiece model or a list of tiktoken ranks; its first byte tells which.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from tokenloom.errors import ModelError
from tokenloom.text.build_tokenizer import PreTokenizerKind, byte_level_bpe, vocabulary_of_ranks
from tokenloom.text.sentencepiece_model import read_sentencepiece

# How text is cut into words is in no file but in the tokenizer's class, else in the kind of model.
_KIND_OF_CLASS: Mapping[str, PreTokenizerKind] = {
    "GPT2Tokenizer": "gpt2",
    "CodeGenTokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2",
}
_KIND_OF_MODEL: Mapping[str, PreTokenizerKind] = {
    "gpt2": "gpt2",
    "gpt_neo": "gpt2",
    "gptj": "gpt2",
    "opt": "gpt2",
    "phi": "gpt2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
}
_END = "<|endoftext|>"
_SUPPORTED = (
    "a tokenizer.json (transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one), a "
    "tokenizer.model, or vocab.json and merges.txt"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the files say: the tokenizer, its named special tokens ("bos_token" -> "<s>"), and whether a text
    begins with the BOS where the configuration says nothing."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    add_bos: bool


def read_vocabulary(
    directory: Path, config: Mapping[str, Any], read_object: Callable[[Path], dict[str, Any]]
) -> Vocabulary:
    """The tokenizer of a directory without tokenizer.json; `config` is its tokenizer_config.json.

    Raises `ModelError` that names the files found and what is wrong with them.
    """
    if (directory / "tokenizer.model").is_file():
        path = directory / "tokenizer.model"
        data = _read_bytes(path)
        if data[:1] == b"\n":  # the first piece, in protocol buffers
            return _sentencepiece(data, path, config)
        return _tiktoken(data, path, config, read_object(directory / "config.json"))
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _vocabulary_and_merges(directory, config, read_object(directory / "config.json"))
    others = [
        path.name
        for name in ("vocab.json", "merges.txt", "tekken.json", "*.tiktoken", "*.model")
        for path in sorted(directory.glob(name))
    ]
    found = f"{', '.join(others)} but no tokenizer.json" if others else "no tokenizer.json"
    raise ModelError(f"{found} in {directory}", _SUPPORTED)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} that cannot be read ({error})", "a readable file") from error


def _sentencepiece(data: bytes, path: Path, config: Mapping[str, Any]) -> Vocabulary:
    model = read_sentencepiece(data, str(path))
    if config.get("add_prefix_space") is False:
        model.add_dummy_prefix = False
    named = {
        "bos_token": model.piece(model.bos_id),
        "eos_token": model.piece(model.eos_id),
        "unk_token": next(
            (p for p, k in zip(model.pieces, model.kinds, strict=True) if k == "unknown"), None
        ),
    }
    tokens = {name: piece for name, piece in named.items() if piece is not None}
    # Files that do not say are from the time when every part got its space.
    backend = model.build(every_prefix=config.get("legacy") is not False)
    return Vocabulary(backend, tokens, add_bos=True)


def _tiktoken(
    data: bytes, path: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Vocabulary:
    form = "a SentencePiece model, or lines of a token in base64 and its rank"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        parts = line.split()
        try:
            if parts:
                token, rank = parts
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path} that cannot be read (line {number}: {error})", form) from error
    if len(set(ranks.values())) != len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ModelError(f"{path} without all 256 bytes, or with one rank twice", form)
    if model_config.get("model_type") != "llama" or not config.get("added_tokens_decoder"):
        # The file names neither the special tokens nor how text is cut into words.
        raise ModelError(
            f"{path} with tiktoken ranks for a model of type {model_config.get('model_type')!r}",
            "such a file of Llama 3, with added_tokens_decoder in tokenizer_config.json; " + _SUPPORTED,
        )
    vocabulary, merges = vocabulary_of_ranks(ranks)
    return Vocabulary(byte_level_bpe(vocabulary, merges, "cl100k", ignore_merges=True), {}, add_bos=True)


def _vocabulary_and_merges(
    directory: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Vocabulary:
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    model_type = str(model_config.get("model_type") or "")
    kind = _KIND_OF_CLASS.get(name) if name else _KIND_OF_MODEL.get(model_type)
    if kind is None:
        raise ModelError(
            f"vocab.json and merges.txt of tokenizer_class {name!r} and model_type {model_type!r}",
            f"tokenizer_class {', '.join(_KIND_OF_CLASS)} or model_type {', '.join(_KIND_OF_MODEL)}; or "
            "a tokenizer.json",
        )
    try:
        vocabulary, merges = models.BPE.read_file(
            str(directory / "vocab.json"), str(directory / "merges.txt")
        )
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ModelError(
            f"vocab.json and merges.txt in {directory} that cannot be read ({error})",
            "a JSON object from tokens to ids, and a merge of two tokens in each line",
        ) from error
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ModelError(f"{directory / 'vocab.json'} that gives one id twice", "an id of its own per token")
    backend = byte_level_bpe(
        vocabulary, merges, kind, add_prefix_space=config.get("add_prefix_space") is True
    )
    names = (
        ("eos_token", "unk_token", "pad_token")
        if kind == "qwen2"
        else ("bos_token", "eos_token", "unk_token")
    )
    known = _END in vocabulary or _END in str(config.get("added_tokens_decoder"))
    return Vocabulary(backend, dict.fromkeys(names, _END) if known else {}, add_bos=False)
