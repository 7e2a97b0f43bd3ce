"""Tokenizers and chat templates out of GGUF files, against llama.cpp's own vectors, SentencePiece and the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.text.conftest import tiny_backend
from tokenloom.errors import ModelError
from tokenloom.text.gguf_tokenizer import read_gguf_tokenizer
from tokenloom.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")

SEPARATOR = "\n__ggml_vocab_test__\n"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file without tensors; a key of `changes` is one of tokenizer.ggml, None leaves it out."""

    def write(fields: dict[str, Any], **changes: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in {**fields, **changes}.items():
            name = key if "." in key else f"tokenizer.ggml.{key}"
            if value is None:
                continue
            if isinstance(value, list):
                writer.add_array(name, value)
            elif isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_string(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


def byte_level() -> dict[str, Any]:
    """The fields of the tiny byte-level tokenizer."""
    state = json.loads(tiny_backend().to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "<s>", "</s>"],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "token_type": [NORMAL] * len(tokens) + [CONTROL] * 2,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }


def pieces() -> dict[str, Any]:
    """The fields of a SentencePiece vocabulary of a few pieces and all bytes."""
    words = ["▁", "a", "b", "ab", "▁a", "▁ab", "aba", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, "<|user|>", "<tool>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), CONTROL, USER_DEFINED]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(i) for i in range(len(tokens))],
        "token_type": kinds,
    }


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "deepseek-coder"])
def test_vectors_of_llama_cpp(name: str, shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "gguf" / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_dir(path)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split(SEPARATOR)
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [int(word) for word in line.split()], text
        # deepseek-coder has letters among its added tokens, which the library decodes as bytes.
        assert tokenizer.decode(ids) == text or (name == "deepseek-coder" and "ü" in text)


def test_word_piece_is_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.model = 'bert'"):
        Tokenizer.from_dir(shared_data / "tokenizers" / "gguf" / "ggml-vocab-bert-bge.gguf")


@pytest.mark.parametrize("name", ["stories260K/tok512.model", "../tokenizers/llama2/tokenizer.model"])
def test_scores_merge_as_sentencepiece_does(name: str, shared_data: Path, write: Write) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is the oracle here")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "models" / name))
    count = theirs.vocab_size()
    kinds = [
        UNKNOWN
        if theirs.IsUnknown(i)
        else CONTROL
        if theirs.IsControl(i)
        else BYTE
        if theirs.IsByte(i)
        else NORMAL
        for i in range(count)
    ]
    fields = {
        "model": "llama",
        "tokens": [theirs.IdToPiece(i) for i in range(count)],
        "scores": [theirs.GetScore(i) for i in range(count)],
        "token_type": kinds,
    }
    tokenizer = Tokenizer.from_dir(write(fields))
    texts = (
        (shared_data / "tokenizers" / "gguf" / "ggml-vocab-llama-spm.gguf.inp").read_text().split(SEPARATOR)
    )
    texts += [
        "Once upon a time, there was a little girl named Lily.",
        "(normal) 6 words, 3 of them odd: äöü 日本",
    ]
    # Other vocabularies than Llama's drop spaces before anything is merged, and llama.cpp does not.
    keeps_spaces = theirs.encode("a  b") != theirs.encode("a b")
    for text in texts:
        if not text or not (keeps_spaces or (text.isascii() and " ".join(text.split()) == text)):
            continue
        assert tokenizer.encode(text) == [theirs.bos_id(), *theirs.encode(text)], text


def test_byte_level_equals_the_library(write: Write) -> None:
    tokenizer = Tokenizer.from_dir(write(byte_level()))
    backend = tiny_backend()

    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def equal(text: str) -> None:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text

    equal()
    assert tokenizer.special_ids == {262, 263}
    assert tokenizer.encode("<s>hello</s>") == backend.encode("<s>hello</s>").ids


def test_what_stands_around_a_text(write: Write) -> None:
    fields = byte_level()
    bos, eos = fields["bos_token_id"], fields["eos_token_id"]
    plain = Tokenizer.from_dir(write(fields)).encode("hello")
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        tokenizer = Tokenizer.from_dir(write(fields, add_bos_token=first, add_eos_token=last))
        assert tokenizer.encode("hello") == [bos] * first + plain + [eos] * last
        assert tokenizer.encode("hello", add_special_tokens=False) == plain
    assert Tokenizer.from_dir(write(fields, pre="llama-bpe")).encode("hello") == [bos, *plain]
    assert Tokenizer.from_dir(write(pieces())).encode("ab")[0] == 1


def test_pieces_prefix_bytes_and_added_tokens(write: Write) -> None:
    tokenizer = Tokenizer.from_dir(write(pieces()))
    fields = pieces()
    ids = {token: i for i, token in enumerate(fields["tokens"])}

    def spelt(text: str, tokenizer: Tokenizer) -> list[str]:
        return [fields["tokens"][i] for i in tokenizer.encode(text, add_special_tokens=False)]

    assert spelt("ab é日", tokenizer) == ["▁ab", "▁", "é", "<0xE6>", "<0x97>", "<0xA5>"]
    assert spelt("<|user|>ab<tool>a", tokenizer) == ["<|user|>", "▁ab", "<tool>", "▁a"]
    assert tokenizer.special_ids == {0, 1, 2, ids["<|user|>"]}
    assert tokenizer.decode(tokenizer.encode("ab é日"), skip_special_tokens=True) == "ab é日"
    bare = Tokenizer.from_dir(write(fields, add_space_prefix=False))
    assert spelt("ab", bare) == ["ab"]
    assert bare.decode(bare.encode(" ab")) == " ab"
    assert spelt("<|user|> \n ab", tokenizer) == ["<|user|>", "▁", "▁", "<0x0A>", "▁ab"]
    strips = Tokenizer.from_dir(write(fields, **{"general.name": "Phi-3 mini"}))
    assert spelt("<|user|> \n ab", strips) == ["<|user|>", "▁ab"]


def test_empty_tokens_keep_their_numbers(write: Write) -> None:
    fields = byte_level()
    fields["tokens"][5] = ""
    assert Tokenizer.from_dir(write(fields)).token_id("[EMPTY_5]") == 5


def test_chat_templates(write: Write) -> None:
    named = {
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = Tokenizer.from_dir(write(byte_level(), **named))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "<s>[hi]"
    assert tokenizer.render_chat(messages, tools=[{"name": "f"}]) == "tools: 1"
    with pytest.raises(ModelError, match="chat template"):
        Tokenizer.from_dir(write(byte_level(), **{"tokenizer.chat_template": "{% for %}"}))


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], str]] = {
    "no model": (byte_level, {"model": None}, "without tokenizer.ggml.model"),
    "unigram": (byte_level, {"model": "t5"}, "'t5'"),
    "another way to cut": (byte_level, {"pre": "kimi-k2"}, "tokenizer.ggml.pre = 'kimi-k2'"),
    "no tokens": (byte_level, {"tokens": None}, "without tokenizer.ggml.tokens"),
    "tokens that are numbers": (byte_level, {"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    "a token twice": (byte_level, {"tokens": ["a", "b", "a"]}, "'a' twice"),
    "no merges": (byte_level, {"merges": None}, "without tokenizer.ggml.merges"),
    "a merge of one part": (byte_level, {"merges": ["he"]}, "the merge 'he'"),
    "a merge of unknown parts": (byte_level, {"merges": ["he llo"]}, "merges or tokens"),
    "too few types": (byte_level, {"token_type": [1, 2]}, "tokenizer.ggml.token_type"),
    "types that are fractions": (byte_level, {"token_type": [0.5] * 264}, "tokenizer.ggml.token_type"),
    "too few scores": (pieces, {"scores": [0.0]}, "tokenizer.ggml.scores"),
    "a score that is no number": (pieces, {"scores": [float("nan")] * 269}, "tokenizer.ggml.scores"),
    "a piece like a book": (
        pieces,
        {"tokens": [*pieces()["tokens"][:-10], "a" * 300, *map(str, range(9))]},
        "300 char",
    ),
    "a bos beyond the tokens": (byte_level, {"bos_token_id": 264}, "bos_token_id = 264"),
    "a bos that is not there": (byte_level, {"bos_token_id": None, "add_bos_token": True}, "bos_token_id"),
    "a flag that is a word": (byte_level, {"add_bos_token": "yes"}, "add_bos_token = 'yes'"),
    "an unknown token beyond": (pieces, {"unknown_token_id": 1000}, "unknown_token_id = 1000"),
    "a template that is a list": (byte_level, {"tokenizer.chat_template": ["x"]}, "chat_template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, write: Write) -> None:
    fields, changes, found = REFUSED[name]
    with pytest.raises(ModelError, match=found):
        read_gguf_tokenizer(write(fields(), **changes))


def test_the_library_is_what_runs(write: Write) -> None:
    assert isinstance(read_gguf_tokenizer(write(byte_level())).backend, tokenizers.Tokenizer)
