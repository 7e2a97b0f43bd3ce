"""`LLM` with speculation and with SLOs: the same outputs, and figures of what was guessed."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tokenloom import LLM, SamplingParams
from tokenloom.engine.request import NO_SLO, Request, Slo
from tokenloom.errors import InvalidParameter

PROMPTS = ["the cat sat on the mat. the cat sat", "a b a b a b"]
OPTIONS: dict[str, Any] = {"num_pages": 64, "threads": 1, "debug": True}


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), slo_class=["fast=tpot_ms:20,ttft_ms:300"], **OPTIONS) as llm:
        yield llm


def test_outputs_are_equal_and_guesses_are_counted(plain: LLM, tiny_model: Path) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=40, logprobs=1),
    ]
    expected = plain.generate(PROMPTS, params)
    with LLM(str(tiny_model), speculate=["ngram"], ngram_min_match=1, draft_pace="fixed", **OPTIONS) as llm:
        found = llm.generate(PROMPTS, params)
    counted = [(one.num_drafted_tokens, one.num_accepted_tokens) for out in found for one in out.outputs]
    assert all(drafted >= accepted >= 0 for drafted, accepted in counted)
    assert counted[0][1] > 10
    for out in found:
        for one in out.outputs:
            one.num_drafted_tokens = one.num_accepted_tokens = 0
    assert [out.outputs for out in found] == [out.outputs for out in expected]


def test_slo_of_each_prompt(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Slo] = []
    add = plain._parts.engine.add_request

    def record(request: Request) -> None:
        seen.append(request.slo)
        add(request)

    monkeypatch.setattr(plain._parts.engine, "add_request", record)
    params = SamplingParams(temperature=0, max_tokens=3)
    one = {"tpot_ms": 40, "ttft_ms": 500}
    expected = plain.generate(PROMPTS, params)
    for given in (one, "fast", Slo(tpot=0.5), [None, one], ["fast", {"ttft_ms": 1}]):
        outputs = plain.generate(PROMPTS, params, slo=given)
        assert [out.outputs for out in outputs] == [out.outputs for out in expected]
    plain.chat([{"role": "user", "content": "x"}], params, slo=one)
    fast, full = Slo(0.02, 0.3), Slo(0.04, 0.5)
    assert seen == [
        *[NO_SLO] * 2,
        *[full] * 2,
        *[fast] * 2,
        *[Slo(0.5, inf)] * 2,
        *[NO_SLO, full],
        *[fast, Slo(inf, 0.001)],
        full,
    ]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tpot_ms": 0}, "slo.tpot_ms"),
        ({"xyz": 1}, "slo.xyz"),
        ("slow", "slo"),
        (7, "slo"),
        ([None], "slo"),
        ([None, 7], "slo"),
        (Slo(tpot=-1.0), "slo.tpot_ms"),
    ],
)
def test_a_bad_slo_is_refused_before_anything_runs(plain: LLM, given: Any, param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        plain.generate(PROMPTS, slo=given)
    assert caught.value.param == param
    assert not plain._parts.engine.has_work


def test_a_bad_class_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidParameter) as caught:
        LLM("no/such/model", slo_class=["fast"])
    assert caught.value.param == "slo_class"
