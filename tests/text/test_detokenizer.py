"""Streamed text is the decoded text, for every kind of decoder and every split of a character."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.text.conftest import SHARED, save
from tokenloom.text.detokenizer import IncrementalDetokenizer
from tokenloom.text.tokenizer import Tokenizer

Load = Callable[[str], Tokenizer]
TEXT = "Zażółć gęślą jaźń 日本語 🎉👩‍👩‍👧‍👦 e\u0301  two spaces\n\ttab — end"


def stream(
    tokenizer: Tokenizer, output: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(token) for token in output), detokenizer.flush()]


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> str:
    """The text of both without the text of the prompt."""
    return beyond(tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *output], skip))


def beyond(before: str, whole: str) -> str:
    """`whole` without the longest beginning that `before` has as well."""
    return whole[
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))) :
    ]


def some_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random tokens, among them many that are no whole characters, and special ones."""
    assert tokenizer.pieces is not None
    broken = [i for i in range(tokenizer.vocab_size) if isinstance(tokenizer.pieces[i], bytes)]
    characters = [tokenizer.encode(c, add_special_tokens=False) for c in "日🎉é ␣ a"]
    lone = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1),
        st.sampled_from(broken),
        st.sampled_from(sorted(tokenizer.special_ids)),
    ).map(lambda token: [token])
    runs = st.lists(st.one_of(lone, st.sampled_from(characters)), max_size=12)
    return runs.map(lambda parts: [token for part in parts for token in part])


@pytest.mark.parametrize("name", SHARED)
@given(data=st.data())
def test_stream_equals_decode(name: str, load: Load, data: st.DataObject) -> None:
    tokenizer = load(name)
    ids = some_ids(tokenizer)
    prompt, output, skip = data.draw(ids), data.draw(ids), data.draw(st.booleans())
    assert "".join(stream(tokenizer, output, prompt, skip)) == text_after(tokenizer, prompt, output, skip)


@given(prompt=st.binary(max_size=6), output=st.binary(max_size=12))
@example(prompt=b"\xed\xa0", output=b"")  # half of an encoded surrogate: Python waits for its third byte
@example(prompt=b"\xed\xa0", output=b"\x80a")
@example(prompt=b"\xe6\x97", output=b"\xa5")
def test_stream_of_any_bytes(tiny: Tokenizer, prompt: bytes, output: bytes) -> None:
    """Every byte a token of its own, read as Python reads UTF-8 with errors."""
    ids = byte_ids(tiny)
    got = "".join(stream(tiny, [ids[b] for b in output], [ids[b] for b in prompt]))
    assert got == beyond(prompt.decode(errors="replace"), (prompt + output).decode(errors="replace"))


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    assert tokenizer.pieces is not None
    return {tokenizer.token_bytes(i)[0]: i for i in range(256)}


@pytest.mark.parametrize("name", SHARED)
def test_every_split_of_a_text(name: str, load: Load) -> None:
    tokenizer = load(name)
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids) + 1):
        got = "".join(stream(tokenizer, ids[cut:], ids[:cut]))
        assert got == text_after(tokenizer, ids[:cut], ids[cut:])
    texts = stream(tokenizer, ids)
    assert "".join(texts) == TEXT
    assert texts[-1] == ""


def test_text_comes_as_soon_as_its_character_is_whole(tiny: Tokenizer) -> None:
    ids = byte_ids(tiny)
    data = "aé日🎉b".encode()
    assert stream(tiny, [ids[b] for b in data]) == ["a", "", "é", "", "", "日", "", "", "", "🎉", "b", ""]


def test_wrong_bytes_come_out_as_soon_as_they_are_known_to_be_wrong(tiny: Tokenizer) -> None:
    ids = byte_ids(tiny)
    for data, want in [
        (b"\xff\xff", ["\ufffd", "\ufffd", ""]),
        (b"\xe6a", ["", "\ufffda", ""]),
        (b"\xe6\xe6\xe6", ["", "\ufffd", "\ufffd", "\ufffd"]),
        (b"\xf0\x9f\x98", ["", "", "", "\ufffd"]),
        (b"\x80" * 5, ["\ufffd"] * 5 + [""]),
    ]:
        assert stream(tiny, [ids[b] for b in data]) == want


def test_sentencepiece_marks_each_wrong_byte(load: Load) -> None:
    llama = load("llama2")
    first = llama.token_id("<0x00>") or 0
    ids = [first + byte for byte in b"\xe6\x97\xff\xe6\x97\xa5\xf0\x9f"]
    assert stream(llama, ids) == ["", "", "\ufffd" * 3, "", "", "日", "", "", "\ufffd\ufffd"]


def test_the_first_space_depends_on_the_prompt(load: Load) -> None:
    llama = load("llama2")
    hello = llama.encode("Hello", add_special_tokens=False)
    bos = [llama.bos_token_id or 0]
    assert stream(llama, hello) == ["Hello", ""]
    assert stream(llama, hello, bos) == ["Hello", ""]
    assert stream(llama, hello, bos, skip=False) == [" Hello", ""]
    assert stream(llama, hello, bos + hello) == [" Hello", ""]
    assert stream(llama, bos + hello, skip=False) == ["<s>", " Hello", ""]


def test_special_tokens(load: Load) -> None:
    gpt2 = load("gpt2")
    end = gpt2.eos_token_id or 0
    ids = [*gpt2.encode("日"), end]
    assert stream(gpt2, ids)[-2:] == ["", ""]
    assert stream(gpt2, ids, skip=False)[-2:] == ["<|endoftext|>", ""]


def word_pieces() -> tokenizers.Tokenizer:
    words = [
        "[UNK]",
        "hello",
        "##s",
        "world",
        "!",
        "un",
        "##believ",
        "##able",
        "'",
        "s",
        "日",
        "##本",
        "[SEP]",
    ]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    words = [
        "<unk>",
        "▁",
        "▁Hello",
        "lo",
        "▁wor",
        "ld",
        "▁▁x",
        "日",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["</s>"])
    return backend


def no_decoder() -> tokenizers.Tokenizer:
    words = ["a", "bc", "d", "é", "</s>"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    return backend


@pytest.fixture(scope="module", params=[word_pieces, metaspace, no_decoder], ids=lambda build: build.__name__)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizers whose decoders do not simply join bytes."""
    return Tokenizer.from_dir(save(request.param(), tmp_path_factory.mktemp("windowed")))


@given(data=st.data())
def test_other_decoders_stream_what_they_decode(windowed: Tokenizer, data: st.DataObject) -> None:
    assert windowed.pieces is None
    whole = [i for i in range(windowed.vocab_size) if not windowed.token_text(i).count("\ufffd")]
    ids = st.lists(st.sampled_from(whole), max_size=20)
    # The context of a prompt is limited, so it should have some text near its end.
    prompt = data.draw(st.sampled_from([[], [3], [2, 3], [3] * 10]))
    output = data.draw(ids)
    assert "".join(stream(windowed, output, prompt)) == text_after(windowed, prompt, output)


def test_other_decoders_hold_incomplete_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(save(metaspace(), tmp_path / "model"))
    first = tokenizer.token_id("<0x00>") or 0
    hello = tokenizer.token_id("▁Hello") or 0
    ids = [hello, *(first + byte for byte in "日🎉".encode()), hello]
    assert stream(tokenizer, ids) == ["Hello", "", "", "日", "", "", "", "🎉", " Hello", ""]
    garbage = stream(tokenizer, [hello, *[first + 0xFF] * 9, hello])
    assert "".join(garbage) == "Hello" + "\ufffd" * 9 + " Hello"
    assert max(len(text) for text in garbage[1:]) <= 10
    assert sum(map(bool, garbage)) >= 4
    assert tokenizer.token_bytes(hello) == b" Hello"


def test_silent_tokens_do_not_pile_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(save(metaspace(), tmp_path / "model"))
    space = tokenizer.token_id("▁") or 0
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    for token in [10**6] * 50 + [space] * 3:
        detokenizer.push(token)
    assert len(detokenizer._stream._window) <= 20  # type: ignore[attr-defined]
    assert detokenizer.push(tokenizer.token_id("▁Hello") or 0).endswith(" Hello")


@pytest.mark.parametrize("name", ["gpt2", "stories260K"])
def test_the_time_per_token_does_not_grow(name: str, load: Load) -> None:
    """The last thousand of 20 000 tokens take about as long as the first thousand."""
    tokenizer = load(name)
    numbers = random.Random(1)
    detokenizer = IncrementalDetokenizer(tokenizer)

    def seconds_for(count: int) -> float:
        ids = [numbers.randrange(tokenizer.vocab_size) for _ in range(count)]
        start = time.process_time()
        for token in ids:
            detokenizer.push(token)
        return time.process_time() - start

    seconds_for(1000)  # pieces are filled on first use
    early = min(seconds_for(1000) for _ in range(5))
    seconds_for(20_000)
    late = min(seconds_for(1000) for _ in range(5))
    assert late < 10 * early + 0.001
