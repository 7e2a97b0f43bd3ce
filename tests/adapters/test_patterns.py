"""Patterns match what Python's `re` matches, and never take long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.adapters.patterns import Budget, Pattern, PatternError

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "_",
        "1",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\W",
        r"\b",
        r"\B",
        "^",
        "$",
        "[ab]",
        "[^a]",
        r"[\d_-]",
        "[]a]",
        "ab",
        "layers",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{,2}", "{2,}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=600)
@given(PATTERNS, st.text("ab_1.", max_size=8).filter(bool))
def test_as_re(pattern: str, name: str) -> None:
    found = Pattern(pattern, Budget())
    assert found.matches(name, Budget()) == bool(re.fullmatch(pattern, name))
    assert found.matches_end(name, Budget()) == bool(re.fullmatch(rf"(.*\.)?({pattern})", name))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a)*b", "(a*)*b", "(a+)+b", "((a?){30}){30}b", "(.*.*.*.*.*.*.*.*)*b", "(a|aa)(a|aa)" * 20,
        "(((((a*)*)*)*)*)*b", "(a{1000}){1000}", ".*" * 1000 + "b", "(" * 15 + "a" + "*)" * 15,
        "a?" * 1000 + "a" * 100,
    ],
)  # fmt: skip
def test_the_time_is_bounded(pattern: str) -> None:
    start = time.perf_counter()
    try:
        budget = Budget()
        found = Pattern(pattern, budget)
        for _ in range(1000):
            assert not found.matches("a" * 60 + "c", budget)
            assert not found.matches_end("a." * 30 + "c", budget)
    except PatternError:  # it was refused as too costly, which is right as well
        pass
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "(a", "a)", "[a", "[", "*", "a**", "a*+", "a++", "a{2}{3}", "a{3,2}", "a{2000}",
        "{", "a{}", "a{b}",
        "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?i)a", "(?i:a)", "(a)\\1", "(?P<n>a)(?P=n)", "\\", "\\n", "\\Z",
        "\\x41",
        "(?>a)", "[z-a]", "[[a]]", "(" * 30 + ")" * 30, "a" * 5000, "a{99999999999}", "(?#c)", "a|*",
    ],
)  # fmt: skip
def test_other_syntax_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern, Budget())


def test_a_pattern_as_found_in_the_wild() -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    budget = Budget()
    found = Pattern(pattern, budget)
    for layer in range(126):
        for name in ("self_attn.q_proj", "self_attn.out", "mlp.down_proj", "input_layernorm"):
            module = f"model.layers.{layer}.{name}"
            assert found.matches(module, budget) == bool(re.fullmatch(pattern, module))
