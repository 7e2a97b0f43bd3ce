"""Tokenizers of the shared test data, as Hugging Face directories."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tokenloom.text.tokenizer import Tokenizer

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SHARED = ("llama2", "gpt2", "stories3M", "stories260K")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def save(backend: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    """Write `backend` as a tokenizer directory."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    return folder


def build_gpt2(source: Path, folder: Path) -> Path:
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt"))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return save(
        backend, folder, bos_token=end, eos_token={"__type": "AddedToken", "content": end}, unk_token=end
    )


def build_llama2(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **LLAMA_TOKENS}
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dirs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> directory for each of `SHARED`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    source = shared_data / "tokenizers"
    directories = {
        "llama2": build_llama2(source / "llama2", folder / "llama2"),
        "gpt2": build_gpt2(source / "gpt2", folder / "gpt2"),
    }
    for name in ("stories3M", "stories260K"):
        directories[name] = folder / name
        directories[name].mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shared_data / "models" / "hf" / name / file, directories[name] / file)
    return directories


@pytest.fixture(scope="session")
def load(tokenizer_dirs: dict[str, Path]) -> Callable[[str], Tokenizer]:
    """Load a shared tokenizer by name, once."""
    loaded: dict[str, Tokenizer] = {}

    def by_name(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = Tokenizer.from_dir(tokenizer_dirs[name])
        return loaded[name]

    return by_name


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that needs no data: the 256 bytes of byte-level BPE, a few merges and special tokens."""
    return save(tiny_backend(), tmp_path_factory.mktemp("tiny") / "bytes", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(tiny_dir)


def tiny_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE: ids 0-255 are the alphabet in sorted order, then merges, then "<s>" and "</s>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ã", "©")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [tokenizers.AddedToken("<s>", special=True), tokenizers.AddedToken("</s>", special=True)]
    )
    return backend
