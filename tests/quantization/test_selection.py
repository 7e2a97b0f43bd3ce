"""Targets of linears against the package that defines them, and patterns that would take for ever."""

from __future__ import annotations

import time

import pytest

from tokenloom.quantization.selection import Targets, TargetSelection, pattern_problem

NAMES = [
    "lm_head",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 11, 111)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.gate")
    ),
]
TARGETS = [
    "lm_head",
    "re:.*lm_head",
    "re:lm_head",
    "re:.*self_attn.k_proj$",
    "re:model.layers.1.*",
    r"re:model\.layers\.1\.",
    "re:.*mlp.gate$",
    r"re:.*layers\.(\d+)\.self_attn\..*",
    "re:.*(q|k|v|o|gate|up|down)_proj",
    "re:^(?!.*mlp).*_proj$",
    "re:visual.*",
    "model.layers.1",
    "model.layers.11.mlp.gate_proj",
]


@pytest.mark.parametrize("target", TARGETS)
def test_targets_fit_as_in_the_package(target: str) -> None:
    pytest.importorskip("torch", reason="compressed-tensors needs torch")
    match = pytest.importorskip("compressed_tensors.utils.match", reason="the package is not installed")
    assert pattern_problem(target) is None
    selection = TargetSelection(targets=Targets.of([target]))
    ignoring = TargetSelection(targets=Targets.of(["Linear"]), ignored=Targets.of([target]))
    for name in NAMES:
        assert selection.selects(name) == match.match_name(name, target)
        assert ignoring.selects(name) != match.match_name(name, target)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*b", "(.*)*x", "(?:a*)+", ".*.*.*.*.*.*b", "(a|a)(a|a)(a|a)(a|a)(a|a)", "a{1,9}{1,9}(b){9}",
        "x" * 300, "(", "[", "*", "a|" * 30, "(?P<x>a)(?P<x>b)", "(?<=a+)b", "\\",
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern: str) -> None:
    assert pattern_problem("re:" + pattern) is not None
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    [".*.*.*.*.*b", "(.|.*)(.|.*)(.|.*)(.|.*)$x", "(a|a|a|a|a|a)(a|a|a|a|a|a)(a|a|a|a|a|a)(a|a|a|a|a|a)b"],
)
def test_patterns_that_pass_end_soon(pattern: str) -> None:
    assert pattern_problem("re:" + pattern) is None
    selection = TargetSelection(targets=Targets.of(["re:" + pattern]))
    start = time.perf_counter()
    assert not selection.selects("a" * 60)
    assert time.perf_counter() - start < 1.5
