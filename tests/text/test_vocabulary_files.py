"""Directories without tokenizer.json: tokenizer.model, or vocab.json with merges.txt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.text.conftest import write_json
from tests.text.test_build_tokenizer import odd_texts
from tokenloom.errors import ModelError
from tokenloom.text.tokenizer import Tokenizer

Make = Callable[..., Path]
LLAMA3_TOKENS = {
    "128000": {"content": "<|begin_of_text|>", "special": True, "normalized": False},
    "128001": {"content": "<|end_of_text|>", "special": True, "normalized": False},
}


@pytest.fixture
def make(shared_data: Path, tmp_path: Path) -> Make:
    """A directory with the vocabulary files of `source` and JSON files by name."""

    def directory(source: str, **objects: object) -> Path:
        for name in ("vocab.json", "merges.txt", "tokenizer.model"):
            if (shared_data / "tokenizers" / source / name).is_file():
                shutil.copy(shared_data / "tokenizers" / source / name, tmp_path / name)
        for name, value in objects.items():
            write_json(tmp_path / f"{name}.json", value)
        return tmp_path

    return directory


def test_sentencepiece_alone_equals_tokenizer_json(make: Make, load: Callable[[str], Tokenizer]) -> None:
    ours, theirs = Tokenizer.from_dir(make("llama2")), load("llama2")
    assert ours.special_tokens == theirs.special_tokens
    assert (ours.vocab_size, ours.special_ids) == (theirs.vocab_size, theirs.special_ids)
    for text in odd_texts(300, seed=8):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({"add_bos_token": False}, "Hello", "<00 Hello>"),
        ({"add_eos_token": True}, "Hello", "<s> Hello</s>"),
        ({"add_prefix_space": False, "add_bos_token": False}, "Hello", "Hello"),
        ({"legacy": False}, "a<s>b", "<s> a<s>b"),
        ({"legacy": True}, "a<s>b", "<s> a<s> b"),
        ({"bos_token": {"content": "</s>"}}, "a", "</s> a"),
    ],
)
def test_what_the_configuration_says(make: Make, config: dict[str, Any], text: str, expected: str) -> None:
    ours = Tokenizer.from_dir(make("llama2", tokenizer_config=config))
    joined = b"".join(map(ours.token_bytes, ours.encode(text))).decode()
    assert joined == expected.replace("<00 Hello>", " Hello")


@pytest.mark.parametrize(
    ("config", "model_config", "more"),
    [
        (None, {"model_type": "gpt2"}, {}),
        ({"tokenizer_class": "GPT2Tokenizer"}, None, {}),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True}, None, {}),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {"model_type": "opt"}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None, {}),
        ({"tokenizer_class": "CodeGenTokenizer"}, None, {"added_tokens": {"<x>": 50257, "  ": 50258}}),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>"},
            None,
            {"added_tokens": {"<|im_start|>": 50257, "<pad>": 50258}},
        ),
    ],
)
def test_vocabulary_and_merges_equal_transformers(
    make: Make, config: dict[str, Any] | None, model_config: dict[str, Any] | None, more: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    files = {"tokenizer_config": config, "config": model_config, **more}
    folder = make("gpt2", **{name: value for name, value in files.items() if value is not None})
    ours, theirs = Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for text in [*odd_texts(300, seed=9), "a<|endoftext|>b<x> c   d<|im_start|>user<pad>"]:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == expected, text
            for skip in (True, False):
                assert ours.decode(expected, skip) == theirs.decode(expected, skip_special_tokens=skip)


def test_tiktoken_ranks_of_llama3(make: Make) -> None:
    config = {"added_tokens_decoder": LLAMA3_TOKENS, "bos_token": "<|begin_of_text|>"}
    ours = Tokenizer.from_dir(make("llama3", tokenizer_config=config, config={"model_type": "llama"}))
    assert ours.encode("Hello world<|end_of_text|>") == [128000, 9906, 1917, 128001]
    assert ours.decode([128000, 9906, 1917]) == "Hello world"
    assert ours.vocab_size == 128002


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no tokenizer.json"),
        ({"qwen.tiktoken": b"x"}, "qwen.tiktoken but no tokenizer.json"),
        ({"vocab.json": b"{}"}, "vocab.json but no tokenizer.json"),
        ({"vocab.json": b"{}", "merges.txt": b""}, "tokenizer_class ''"),
        ({"vocab.json": b"[]", "merges.txt": b"", "config.json": b'{"model_type":"opt"}'}, "cannot be read"),
        (
            {"vocab.json": b'{"a":0,"b":0}', "merges.txt": b"", "config.json": b'{"model_type":"opt"}'},
            "one id",
        ),
        (
            {"vocab.json": b'{"a":0}', "merges.txt": b"a b", "config.json": b'{"model_type":"opt"}'},
            "merges that",
        ),
        (
            {"vocab.json": b'{"a":0}', "merges.txt": b"#\nab", "config.json": b'{"model_type":"opt"}'},
            "cannot",
        ),
        ({"tokenizer.model": b""}, "without all 256 bytes"),
        ({"tokenizer.model": b"version https://git-lfs.github.com/spec/v1\n"}, "line 1"),
        ({"tokenizer.model": b"\n\x05abc"}, "behind the data"),
        ({"tokenizer.model": b"YQ== 0\nYQ= 1\n"}, "line 2"),
        ({"tokenizer.json": b"{}", "vocab.json": b"{}"}, "tokenizer.json that cannot be read"),
    ],
)
def test_directories_that_are_refused(tmp_path: Path, files: dict[str, bytes], found: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_dir(tmp_path)
    assert found in str(caught.value)


def test_a_tokenizer_of_unknown_class_is_refused(make: Make) -> None:
    folder = make(
        "gpt2", tokenizer_config={"tokenizer_class": "RobertaTokenizer"}, config={"model_type": "gpt2"}
    )
    with pytest.raises(ModelError, match="RobertaTokenizer"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("source", "config", "found"),
    [
        ("gpt2", {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, "add_bos_token without"),
        ("llama2", {"add_bos_token": 1.5}, "add_bos_token 1.5"),
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": []}, "added_tokens_decoder"),
    ],
)
def test_configurations_that_are_refused(make: Make, source: str, config: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_dir(make(source, tokenizer_config=config))
    assert found in str(caught.value)


def test_added_tokens_of_another_form(make: Make) -> None:
    folder = make("gpt2", added_tokens={"<x>": "y"}, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(ModelError, match=r"added_tokens\.json of another form"):
        Tokenizer.from_dir(folder)


def test_ranks_without_special_tokens_are_refused(make: Make) -> None:
    with pytest.raises(ModelError, match="added_tokens_decoder"):
        Tokenizer.from_dir(make("llama3", config={"model_type": "llama"}))
    with pytest.raises(ModelError, match="'other'"):
        Tokenizer.from_dir(
            make(
                "llama3",
                config={"model_type": "other"},
                tokenizer_config={"added_tokens_decoder": LLAMA3_TOKENS},
            )
        )
