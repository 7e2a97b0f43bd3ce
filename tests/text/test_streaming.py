"""Nasty texts and ids streamed through detokeniser and stop strings, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.text.conftest import SHARED
from tests.text.test_build_tokenizer import odd_texts
from tokenloom.text.detokenizer import IncrementalDetokenizer
from tokenloom.text.output_text import OutputText
from tokenloom.text.stop_matcher import StopMatcher
from tokenloom.text.tokenizer import Tokenizer

Load = Callable[[str], Tokenizer]
NASTY = [
    "日本語 🎉👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 नमस्ते العربية \u202eabc",
    "  two  leading\n\n\ttabs \r\n \u3000 end  ",
    "\x00\x01\x7f\x85\u2028\ufffd\ufeff \U0010ffff",
    " , . ! 's n't 'm ( spaces before ) dots",
    "<0x0A> ▁ <|im_end|> </s x",
    "🇩🇪🇫🇷🇯🇵" * 3,
]


@pytest.mark.parametrize("name", SHARED)
def test_streams_are_the_decoded_text_and_show_no_half_characters(name: str, load: Load) -> None:
    tokenizer = load(name)
    for text in [*NASTY, *odd_texts(200, seed=11)]:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            shown = ""
            whole = tokenizer.decode(ids, skip)
            for token in ids:
                shown += detokenizer.push(token)
                assert whole.startswith(shown), text
            assert shown + detokenizer.flush() == whole


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_the_library_streams_the_same(name: str, load: Load) -> None:
    """The `tokenizers` library's own stream, which vLLM uses; no clean-up of spaces in either."""
    ours = load(name)
    backend = ours._backend
    for text in [*NASTY, *odd_texts(200, seed=12)]:
        ids = ours.encode(text, add_special_tokens=False)
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        theirs = "".join(stream.step(backend, token) or "" for token in ids)
        # The library never gives out text that ends in U+FFFD.
        assert ours.decode(ids).startswith(theirs.rstrip("\ufffd")), text
        if "\ufffd" not in text:
            assert ours.decode(ids) == theirs, text


@pytest.mark.parametrize("name", SHARED)
def test_decode_equals_transformers_without_clean_up(
    name: str, load: Load, tokenizer_dirs: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dirs[name]))
    for text in [*NASTY, *odd_texts(100, seed=13)]:
        ids = load(name).encode(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert load(name).decode(ids, skip) == expected


def first_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is completed first; of several at once, the longest."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - len(max(found, key=len))]
    return text


@pytest.mark.parametrize("text", NASTY)
def test_stop_strings_in_every_split_into_three(text: str) -> None:
    text = text[:24]
    stop = [text[i : i + 3] for i in range(2, len(text) - 3, 5)] + ["never", text[-1] * 2]
    for a, b in combinations(range(len(text) + 1), 2):
        matcher = StopMatcher(stop)
        shown = "".join(matcher.push(part).emit for part in (text[:a], text[a:b], text[b:]))
        assert shown + matcher.flush() == first_stop(text, stop)


@pytest.mark.parametrize("name", SHARED)
@given(data=st.data())
def test_random_ids_through_stop_strings(name: str, load: Load, data: st.DataObject) -> None:
    """Ids of any kind, among them bytes that are no text: the text up to the first stop string."""
    tokenizer = load(name)
    assert tokenizer.pieces is not None
    low = st.integers(0, min(400, tokenizer.vocab_size - 1))  # bytes and special tokens come first
    ids = data.draw(st.lists(low | st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    skip = data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip)
    cuts = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 4) if i + n <= len(whole)]
    stop = data.draw(st.lists(st.sampled_from(cuts), max_size=2)) if cuts else []
    output = OutputText(tokenizer, stop=[*stop, "\x00never"], skip_special_tokens=skip)
    shown = ""
    for token in ids:
        delta = output.push(token)
        shown += delta.text
        if delta.stop is not None:
            assert shown == first_stop(whole, stop)
            return
    # What flushing completes, an unfinished character, is shown and not searched.
    assert shown + output.finish() == whole
