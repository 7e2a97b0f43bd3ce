"""Stop strings: what is found does not depend on how the text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.errors import InvalidParameter
from tokenloom.text.stop_matcher import StopMatcher

few_letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stop: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string that is completed, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(matcher: StopMatcher, pushes: Sequence[str]) -> tuple[str, str | None]:
    shown = ""
    stopped = None
    for text in pushes:
        emit, stopped = matcher.push(text)
        shown += emit
    return shown + matcher.flush(), stopped


@given(st.lists(few_letters, max_size=8), stops, st.booleans())
def test_any_split_is_the_whole_text(parts: list[str], stop: list[str], include: bool) -> None:
    text = "".join(parts)
    want = expected(text, stop, include)
    assert run(StopMatcher(stop, include), parts) == want
    assert run(StopMatcher(stop, include), list(text)) == want
    assert run(StopMatcher(stop, include), [text]) == want


@given(st.lists(few_letters, max_size=8), stops)
def test_only_what_may_begin_a_stop_string_is_held(parts: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    shown = text = ""
    for part in parts:
        emit, stopped = matcher.push(part)
        text += part
        shown += emit
        if stopped is not None:
            return
        assert text.startswith(shown)
        held = text[len(shown) :]
        longest = max((k for s in stop for k in range(len(s)) if text.endswith(s[:k])), default=0)
        assert len(held) == longest


@pytest.mark.parametrize(
    ("stop", "pushes", "include", "want"),
    [
        (["\n\n"], ["one\n", "two\n", "\nthree"], False, ("one\ntwo", "\n\n")),
        (["\n\n"], ["one\n", "two\n", "\nthree"], True, ("one\ntwo\n\n", "\n\n")),
        (["abcd", "bc"], ["xabcd"], False, ("xa", "bc")),
        (["bc", "abc"], ["xabc"], False, ("x", "abc")),
        (["END"], ["the EN", "D."], False, ("the ", "END")),
        (["END"], ["the EN", "d."], False, ("the ENd.", None)),
        (["END"], ["the EN"], False, ("the EN", None)),
        (["aab"], ["aaa", "ab"], False, ("aa", "aab")),
        (["🎉"], ["party ", "🎉", "!"], False, ("party ", "🎉")),
        (["^]-\\"], ["a^]", "-\\b"], False, ("a", "^]-\\")),
        ([], ["any", "thing"], False, ("anything", None)),
    ],
)
def test_examples(stop: list[str], pushes: list[str], include: bool, want: tuple[str, str | None]) -> None:
    assert run(StopMatcher(stop, include), pushes) == want


def test_after_the_stop_nothing_changes() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("one. two") == ("one", ".")
    assert matcher.push("three.") == ("", ".")
    assert matcher.flush() == ""


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="stop"):
        StopMatcher(["x", ""])


def test_long_repetitive_stop_strings_stay_cheap() -> None:
    """A million characters that keep all stop strings almost complete."""
    matcher = StopMatcher(["a" * (1000 + i) + "b" for i in range(16)])
    shown = sum(len(matcher.push("a" * 1000).emit) for _ in range(1000))
    assert shown + len(matcher.flush()) == 1_000_000
