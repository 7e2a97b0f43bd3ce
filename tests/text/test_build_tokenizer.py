"""Built tokenizers against SentencePiece, transformers and the test vectors of llama.cpp."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.errors import ModelError
from tokenloom.text.build_tokenizer import (
    PRE_TOKENIZER_KINDS,
    PieceKind,
    byte_level_bpe,
    merges_of_scores,
    put_around,
    sentencepiece_bpe,
    vocabulary_of_ranks,
)
from tokenloom.text.sentencepiece_model import SentencePieceModel, read_sentencepiece

ODD = [
    *"ab01 \n\t\r\0\x01\x7f\xa0éÅﬁ½日本اעह\u0301\u200d\ufe0f\u3000\u2028\ufffd▁🎉\U0010ffff",
    *(
        "  ",
        "\r\n",
        "👩‍👩‍👧",
        "हि",
        "Hello",
        " the",
        "ing",
        "'s",
        "'LL",
        "123",
        "...",
        "==",
        "<0x0A>",
        "\n\n",
        "<mask>",
    ),
]
Gpt2 = tuple[dict[str, int], list[tuple[str, str]]]
SEPARATOR = "\n__ggml_vocab_test__\n"


def odd_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of odd parts, of any characters, and of letters that merge in many ways."""
    rng = random.Random(seed)
    planes = ((0, 0x80), (0, 0xD800), (0xE000, 0x110000))
    for i in range(count):
        if i % 3 == 0:
            yield "".join(rng.choice(ODD) for _ in range(rng.randrange(15)))
        elif i % 3 == 1:
            yield "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(12)))
        else:
            yield "".join(rng.choice("ab aeinst\n") for _ in range(rng.randrange(60)))


def ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def vectors(shared_data: Path, kind: str) -> list[tuple[str, list[int]]]:
    """Inputs and ids of a vocabulary's test vectors."""
    start = shared_data / "tokenizers" / "gguf" / f"ggml-vocab-{kind}.gguf"
    inputs = start.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    outputs = start.with_suffix(".gguf.out").read_text().split("\n")
    assert len(inputs) == len(outputs) == 47
    return [
        (text, [int(token) for token in line.split()]) for text, line in zip(inputs, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> tuple[tokenizers.Tokenizer, Any]:
    return both((shared_data / "tokenizers" / "llama2" / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def gpt2_files(shared_data: Path) -> Gpt2:
    folder = shared_data / "tokenizers" / "gpt2"
    return tokenizers.models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def llama3(shared_data: Path) -> tokenizers.Tokenizer:
    lines = (shared_data / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    vocabulary, merges = vocabulary_of_ranks(ranks)
    return byte_level_bpe(vocabulary, merges, "cl100k", ignore_merges=True)


def both(data: bytes) -> tuple[tokenizers.Tokenizer, Any]:
    """Our tokenizer and SentencePiece's of a model file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return read_sentencepiece(data, "model").build(), sentencepiece.SentencePieceProcessor(model_proto=data)


def test_llama2_equals_sentencepiece(llama2: tuple[tokenizers.Tokenizer, Any]) -> None:
    ours, theirs = llama2
    texts = list(odd_texts(6000))
    for text, expected in zip(texts, theirs.encode(texts), strict=True):
        assert ids(ours, text) == expected, text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_llama2_equals_sentencepiece_on_any_text(llama2: tuple[tokenizers.Tokenizer, Any], text: str) -> None:
    for spelt in ("<s>", "</s>", "<unk>"):  # special tokens here, plain text in SentencePiece
        text = text.replace(spelt, "")
    assert ids(llama2[0], text) == llama2[1].encode(text)


def test_llama2_equals_its_tokenizer_json(
    llama2: tuple[tokenizers.Tokenizer, Any], shared_data: Path
) -> None:
    folder = shared_data / "tokenizers" / "llama2"
    theirs = tokenizers.Tokenizer.from_str(
        gzip.decompress((folder / "tokenizer.json.gz").read_bytes()).decode()
    )
    assert llama2[0].get_vocab() == theirs.get_vocab()
    for text in [*odd_texts(1500, seed=1), "<s>a</s> b<s><s> <unk>c", "[INST] x [/INST]</s><s>y"]:
        assert ids(llama2[0], text) == ids(theirs, text), text
        for skip in (True, False):
            found = llama2[0].decode(ids(theirs, text), skip)
            assert found == theirs.decode(ids(theirs, text), skip)


@pytest.mark.parametrize("kind", ["llama-spm", "phi-3"])
def test_vectors_of_sentencepiece(
    kind: str, llama2: tuple[tokenizers.Tokenizer, Any], shared_data: Path
) -> None:
    for text, expected in vectors(shared_data, kind):
        assert ids(llama2[0], text) == expected, text


def test_vectors_of_gpt2(gpt2_files: Gpt2, shared_data: Path) -> None:
    backend = byte_level_bpe(gpt2_files[0], gpt2_files[1], "gpt2")
    for text, expected in vectors(shared_data, "gpt-2"):
        assert ids(backend, text) == expected, text


def test_vectors_of_llama3(llama3: tokenizers.Tokenizer, shared_data: Path) -> None:
    for text, expected in vectors(shared_data, "llama-bpe"):
        assert ids(llama3, text) == expected, text


def test_llama3_equals_the_rule_of_tiktoken(llama3: tokenizers.Tokenizer, shared_data: Path) -> None:
    """Joining by the lowest rank, written out, for each word of odd texts."""
    pre_tokenizer = llama3.pre_tokenizer
    assert pre_tokenizer is not None
    vocabulary = llama3.get_vocab()
    for text in odd_texts(900, seed=2):
        expected: list[int] = []
        for word, _ in pre_tokenizer.pre_tokenize_str(text):
            expected += join_by_rank(word, vocabulary)
        assert ids(llama3, text) == expected, text


def join_by_rank(word: str, ranks: dict[str, int]) -> list[int]:
    parts = list(word)
    while True:
        pairs = [(ranks.get(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1)]
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_byte_level_equals_transformers(kind: Any, gpt2_files: Gpt2) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary, merges = gpt2_files
    classes: dict[str, Callable[..., Any]] = {
        "gpt2": transformers.GPT2Tokenizer,
        "qwen2": transformers.Qwen2Tokenizer,
    }
    theirs = classes[kind](vocab=vocabulary, merges=merges)
    ours = byte_level_bpe(vocabulary, merges, kind)
    for text in odd_texts(3000, seed=3):
        assert ids(ours, text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("kind", PRE_TOKENIZER_KINDS)
def test_every_kind_loses_nothing(kind: Any, gpt2_files: Gpt2) -> None:
    backend = byte_level_bpe(gpt2_files[0], gpt2_files[1], kind, normalize_nfc=False)
    for text in odd_texts(600, seed=4):
        assert backend.decode(ids(backend, text)) == text


def test_how_each_kind_cuts_words(gpt2_files: Gpt2) -> None:
    """Where the kinds differ: digits, contractions, capitals, slashes and line breaks."""
    text = "HelloWorld don't12345/\n\nx DON'T"
    cuts = {
        "gpt2": ["HelloWorld", " don", "'t", "12345", "/", "\n", "\n", "x", " DON", "'", "T"],
        "digits": ["HelloWorld", " don", "'t", *"12345", "/", "\n", "\n", "x", " DON", "'", "T"],
        "cl100k": ["HelloWorld", " don", "'t", "123", "45", "/\n\n", "x", " DON", "'T"],
        "qwen2": ["HelloWorld", " don", "'t", *"12345", "/\n\n", "x", " DON", "'T"],
        "o200k": ["Hello", "World", " don't", "123", "45", "/\n\n", "x", " DON'T"],
        "deepseek-coder": ["HelloWorld", " don", "'", "t", *"12345", "/", "\n", "\n", "x", " DON", "'", "T"],
    }
    for kind in PRE_TOKENIZER_KINDS:
        pre_tokenizer = byte_level_bpe(gpt2_files[0], gpt2_files[1], kind).pre_tokenizer
        assert pre_tokenizer is not None
        words = [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]
        assert words == cuts[kind], kind


# SentencePiece models of every kind, trained here.

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TRAINED: dict[str, dict[str, Any]] = {
    "spaces removed": {**IDENTITY, "remove_extra_whitespaces": True, "byte_fallback": True},
    "no byte fallback": {**IDENTITY},
    "no prefix": {**IDENTITY, "byte_fallback": True, "add_dummy_prefix": False},
    "user-defined": {
        **IDENTITY,
        "byte_fallback": True,
        "user_defined_symbols": ["<mask>", "the", "\n\n", "('", ".*"],
        "control_symbols": ["<tool>"],
    },
    "user-defined spaces": {
        **IDENTITY,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["▁▁", "▁▁▁", "\n\n"],
    },
    "words of many words": {**IDENTITY, "byte_fallback": True, "split_by_whitespace": False},
    "digits": {**IDENTITY, "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True},
}


def train(**options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(5)
    words = ["the", "then", "sing", "singing", "rest", "resting", "naïve", "日本", "ﬁ", "12", "aaa", "tin"]
    lines = [" ".join(rng.choice(words) for _ in range(9)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        minloglevel=5,
        hard_vocab_limit=False,
        **{"model_type": "bpe", "vocab_size": 370 if options.get("byte_fallback") else 110, **options},
    )
    return model.getvalue()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_equal_sentencepiece(name: str) -> None:
    ours, theirs = both(train(**TRAINED[name]))
    texts = list(odd_texts(3000, seed=6))
    for text, expected in zip(texts, theirs.encode(texts), strict=True):
        assert ids(ours, text) == expected, text
        if "byte_fallback" in TRAINED[name]:  # the unknown piece is special here
            assert ours.decode(expected) == theirs.decode(expected), text


def test_normalisation_equals_sentencepiece_outside_combining_characters() -> None:
    ours, theirs = both(train(normalization_rule_name="nmt_nfkc", byte_fallback=True))
    for text in (
        "ﬁ Å  ½\u3000 ﬀ",
        " the\tthen\n ",
        "ＡＢＣ　１２",
        "naïve nai\u0308ve",
        "①②③",
        "日本 ㍻",
        "",
    ):
        assert ids(ours, text) == theirs.encode(text), text


# What is refused.


def message(*fields: bytes) -> bytes:
    return b"".join(fields)


def block(number: int, data: bytes) -> bytes:
    """A length-delimited field shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(data)]) + data


PIECE = block(1, block(1, b"a") + b"\x15\x00\x00\x80\xbf")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "without pieces"),
        (b"\n", "does not end"),
        (PIECE[:-1], "behind the data"),
        (b"\xff" * 20, "does not end"),
        (b"\x0b\x00", "wire type 3"),
        (block(1, block(1, b"\xff")), "utf-8"),
        (block(1, block(1, b"")), "piece 0 is ''"),
        (block(1, block(1, b"a") + b"\x15\x00\x00\xc0\x7f"), "score nan"),
        (block(1, block(1, b"a") + b"\x18\x09"), "9"),
        (b"\x08\x01", "a number where bytes"),
        (block(1, block(1, b"a") + block(3, b"x")), "bytes where a number"),
        (PIECE + block(2, b"\x18\x07"), "7"),
    ],
)
def test_model_files_that_are_none(data: bytes, found: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_sentencepiece(data, "some/file")
    assert found in str(caught.value)
    assert "some/file" in str(caught.value)


@settings(max_examples=300)
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", PIECE, PIECE + block(2, b"\x18\x02")]))
def test_garbage_is_refused_or_a_model(data: bytes, start: bytes) -> None:
    with contextlib.suppress(ModelError):
        read_sentencepiece(start + data, "file").build()


def test_numbers_and_fields_of_other_versions_are_read() -> None:
    data = PIECE + block(2, b"\x18\x02" + b"\xc8\x02" + b"\xff" * 9 + b"\x01" + b"\xe1\x3e" + b"\0" * 8)
    model = read_sentencepiece(data, "file")
    assert (model.model_type, model.bos_id, model.eos_id) == ("bpe", -1, 2)
    assert model.piece(-1) is None and model.piece(0) == "a" and model.scores == [-1.0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "unigram"}, "type unigram"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"escape_whitespaces": False}, "escape_whitespaces"),
        ({"denormalizes": True}, "a denormalizer"),
        ({"charsmap": b"garbage"}, "character map"),
        ({"kinds": ["normal", "unused"]}, "unused pieces"),
        ({"kinds": ["normal", "normal"]}, "unknown characters"),
        ({"kinds": ["byte", "unknown"]}, "1 byte pieces"),
        ({"pieces": ["a", "a"]}, "piece 'a' twice"),
        ({"pieces": ["a" * 100_000, "b"]}, "a piece of 100000 characters"),
        ({"scores": [0.0]}, "1 scores"),
        ({"pieces": [], "scores": [], "kinds": []}, "0 pieces"),
    ],
)
def test_models_that_are_refused(change: dict[str, Any], found: str) -> None:
    fields: dict[str, Any] = {"pieces": ["a", "<unk>"], "scores": [0.0, 0.0], "kinds": ["normal", "unknown"]}
    model = SentencePieceModel(**{**fields, "model_type": "bpe", **change})
    with pytest.raises(ModelError) as caught:
        model.build()
    assert found in str(caught.value)


def test_a_prefix_at_the_beginning_only(llama2: tuple[tokenizers.Tokenizer, Any], shared_data: Path) -> None:
    """transformers' way for files that say `legacy: false`."""
    transformers = pytest.importorskip("transformers")
    model = read_sentencepiece(
        (shared_data / "tokenizers" / "llama2" / "tokenizer.model").read_bytes(), "file"
    )
    ours = model.build(every_prefix=False)
    vocabulary = {piece: i for i, piece in enumerate(model.pieces)}
    merges = merges_of_scores(vocabulary, model.scores, model.kinds)
    theirs = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges)
    for text in [*odd_texts(1000, seed=7), "<s>a</s> b<s><s> <unk>c"]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ids(ours, text) == expected, text
        assert ours.decode(expected, False) == theirs.decode(expected)
    assert ids(ours, "<s>a") != ids(llama2[0], "<s>a")


def test_byte_level_input_that_is_refused() -> None:
    with pytest.raises(ModelError, match="merges that do not fit"):
        byte_level_bpe({"a": 0}, [("a", "b")], "gpt2")
    with pytest.raises(ModelError, match="pre-tokenizer 'bert'"):
        byte_level_bpe({"a": 0}, [], "bert")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="a piece of 100000 characters"):
        vocabulary_of_ranks({b"a" * 100_000: 0})
    backend = byte_level_bpe({"a": 0}, [], "gpt2")
    with pytest.raises(ModelError, match="'<s>' to put around"):
        put_around(backend, "<s>", None)


def test_spelt_bytes_are_no_bytes() -> None:
    """Text that spells a byte token must not become that byte, also beside user-defined pieces."""
    data = train(**TRAINED["user-defined spaces"])
    ours, theirs = both(data)
    for text in ("<0x0A>", "\n\n<0x0A>", "<0x0A>\n\n", "\n\n<0x41>\n\n<0x42>", "<0x0a>", "<0xZZ>"):
        assert ids(ours, text) == theirs.encode(text), text
        assert ours.decode(ids(ours, text)) == text


def test_kinds_are_named() -> None:
    kinds: list[PieceKind] = ["unknown", "control", "normal"]
    backend = sentencepiece_bpe(["<unk>", "<s>", "a"], [0, 0, -1], kinds, prefix="none")
    assert ids(backend, "<s>abc<unk>") == [1, 2, 0, 0]
    assert backend.decode([1, 2]) == "a"
    assert json.loads(backend.to_str())["model"]["unk_token"] == "<unk>"
