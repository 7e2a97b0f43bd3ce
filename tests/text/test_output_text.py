"""Output text: the engine's stop checker and the API's text agree; offsets of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.text.output_text import OutputText, make_stop_checker, output_text_of, token_offsets
from tokenloom.text.tokenizer import Tokenizer

Load = Callable[[str], Tokenizer]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["gpt2", "stories260K"])
@given(data=st.data())
def test_engine_and_api_agree(name: str, load: Load, data: st.DataObject) -> None:
    """The checker stops on the very token with which the API's text ends, with the same string."""
    tokenizer = load(name)
    tokens = st.lists(st.integers(0, min(tokenizer.vocab_size, 500) - 1), max_size=30)
    prompt, output = data.draw(tokens), data.draw(tokens)
    params = SamplingParams(
        stop=tuple(
            data.draw(st.lists(st.text("aeth \ufffd", min_size=1, max_size=3), min_size=1, max_size=4))
        ),
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 3)),
    )
    checker = make_stop_checker(tokenizer)(prompt, params)
    text = output_text_of(tokenizer, prompt, params)
    plain = OutputText(tokenizer, prompt, skip_special_tokens=params.skip_special_tokens)
    assert checker is not None
    shown = whole = ""
    for token in output:
        stop = checker.push(token)
        delta = text.push(token)
        unstopped = plain.push(token)
        whole += unstopped.text
        shown += delta.text
        assert stop == delta.stop
        assert delta.offset == unstopped.offset
        assert whole.startswith(shown)
        if stop is not None:
            end = len(shown) if params.include_stop_str_in_output else len(shown) + len(stop)
            assert whole[:end].endswith(stop)
            assert text.finish() == ""
            return
    assert shown + text.finish() == whole + plain.finish()
    assert text.num_chars == plain.num_chars


def test_no_checker_without_stop_strings(tiny: Tokenizer) -> None:
    assert make_stop_checker(tiny)([], SamplingParams()) is None


def test_stop_string_over_several_tokens(tiny: Tokenizer) -> None:
    output = OutputText(tiny, stop=["lo th"])
    deltas = [
        output.push(token) for token in [*ids_of(tiny, "hel"), *ids_of(tiny, "lo"), *ids_of(tiny, " the")]
    ]
    assert "".join(delta.text for delta in deltas) == "hel"
    assert deltas[-1].stop == "lo th"
    assert output.push(0).stop == "lo th"
    assert output.finish() == ""


def test_stop_string_with_a_character_in_pieces(tiny: Tokenizer) -> None:
    output = OutputText(tiny, stop=["🎉"], include_stop_str_in_output=True)
    ids = ids_of(tiny, "a🎉b")
    assert [output.push(token)[:2] for token in ids[:-1]] == [
        ("a", None),
        ("", None),
        ("", None),
        ("", None),
        ("🎉", "🎉"),
    ]


def test_the_first_tokens_are_not_searched(tiny: Tokenizer) -> None:
    output = OutputText(tiny, stop=["a", "bc"], min_tokens=2)
    assert [output.push(token).stop for token in ids_of(tiny, "abcbc")] == [None, None, None, None, "bc"]


def test_what_was_held_comes_at_the_end(tiny: Tokenizer) -> None:
    output = OutputText(tiny, stop=["xyz"])
    texts = [output.push(token).text for token in [*ids_of(tiny, "axy"), ids_of(tiny, "日")[0]]]
    assert texts == ["a", "", "", ""]
    assert output.finish() == "xy\ufffd"
    assert output.num_chars == 4


def test_a_stop_string_is_not_completed_by_the_end(tiny: Tokenizer) -> None:
    """The engine has ended the sequence already, so an incomplete character at the end completes nothing."""
    output = OutputText(tiny, stop=["x\ufffd"])
    for token in [*ids_of(tiny, "x"), ids_of(tiny, "日")[0]]:
        assert output.push(token).stop is None
    assert output.finish() == "x\ufffd"


def test_offsets(tiny: Tokenizer, load: Load) -> None:
    assert token_offsets(tiny, ids_of(tiny, "hello the 日é!")) == [0, 5, 7, 9, 10, 10, 10, 11, 12]
    llama = load("llama2")
    ids = llama.encode("Hello world 🎉")
    offsets = token_offsets(llama, ids)
    text = llama.decode(ids)
    words = [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    assert words == ["", "Hello", " world", " ", "", "", "", "🎉"]
    assert token_offsets(llama, ids, skip_special_tokens=False)[:3] == [0, 3, 9]
