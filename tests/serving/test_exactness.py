"""Requests of the class `distribution` before the embedded model, with real proposers."""

from __future__ import annotations

from typing import Any

import pytest

from tokenloom import LLM, SamplingParams
from tokenloom.errors import InvalidParameter
from tokenloom.kernels.native import extension

OPTIONS: dict[str, Any] = {"speculate": ("draft", "ngram"), "draft_pace": "fixed", "debug": True}
STORY = "Once upon a time there was a little fox. The fox had a red ball. The fox had a red"

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def params(**changes: Any) -> list[SamplingParams]:
    fields: dict[str, Any] = {"max_tokens": 40, "temperature": 0.8, "top_p": 0.95, "logprobs": 3, **changes}
    return [SamplingParams(seed=seed, **fields) for seed in range(8)]


def test_sampled_texts_are_other_ones_with_the_logprobs_of_plain_decoding() -> None:
    with LLM(**OPTIONS) as llm:
        prompt = llm.encode(STORY)
        outputs = llm.generate([prompt] * 8, params(n=2), exactness="distribution", progress=False)
        stats = llm._parts.engine.speculator.stats
        # What a draft drew and rejection took: most of it, where a draft is like its target.
        assert stats.num_accepted > 0.25 * stats.num_drafted > 100
        again = llm.generate([prompt] * 8, params(n=2), progress=False)
        assert [o.outputs[0].token_ids for o in outputs] != [o.outputs[0].token_ids for o in again]
    samples = [sample for output in outputs for sample in output.outputs]
    with LLM() as plain:
        texts = [[*prompt, *sample.token_ids] for sample in samples]
        scores = plain.generate(
            texts, SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=3), progress=False
        )
    for sample, score in zip(samples, scores, strict=True):
        assert score.prompt_logprobs is not None
        assert score.prompt_logprobs[len(prompt) :] == sample.logprobs


def test_greedy_texts_are_the_same() -> None:
    greedy = params(temperature=0.0, top_p=1.0)[:1]
    with LLM() as plain, LLM(**OPTIONS) as llm:
        expected = plain.generate([STORY], greedy, progress=False)[0].outputs[0]
        found = llm.generate([STORY], greedy, exactness="distribution", progress=False)[0].outputs[0]
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)


def test_without_speculation_it_changes_nothing() -> None:
    with LLM() as llm:
        texts = [
            [
                output.outputs[0].token_ids
                for output in llm.generate([STORY] * 8, params(), exactness=kind, progress=False)
            ]
            for kind in ("exact", "distribution")
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("value", ["Exact", "", None, 1, ["exact"]])
def test_another_class_is_refused_by_name(value: Any) -> None:
    with LLM() as llm, pytest.raises(InvalidParameter) as caught:
        llm.generate([STORY], exactness=value)
    assert caught.value.param == "exactness"
