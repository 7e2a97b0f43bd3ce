"""Real proposers before the embedded model: every output is that of plain decoding, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.helpers import write_tiny_model
from tokenloom import LLM, SamplingParams
from tokenloom.embedded import ADAPTERS
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.native import extension

STORY = "Once upon a time there was a little fox. The fox had a red ball. The fox had a red"
WORDS = "dog cat bird ball tree boat king queen".split()
ADAPTER_NAMES = [None, "pirate", "card"]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "logit_bias": {300: 2.0, 301: -100.0}},
    {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.2, "n": 2},
    {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"temperature": 0.9, "allowed_token_ids": tuple(range(2, 4096, 2))},
    {"temperature": 0.0, "stop": ["the", "."], "min_tokens": 6},
    {"temperature": 0.0, "ignore_eos": True, "bad_words": ["fox", "red ball"]},
    {"temperature": 0.6, "prompt_logprobs": 1},
]


def workload(llm: LLM) -> tuple[list[list[int]], list[SamplingParams], list[str | None]]:
    """Two requests of each kind: texts, ends and padding inside prompts, one token and many."""
    prompts, params, adapters = [], [], []
    for number in range(2 * len(KINDS)):
        ids = llm.encode(f"{STORY} {WORDS[number % 8]}")
        if number % 6 == 1:
            ids = ids[:1]
        if number % 6 == 2:
            ids = [2, 0, 2, *ids, 2, 0]
        if number % 6 == 3:
            ids = ids * 12
        prompts.append(ids)
        params.append(
            SamplingParams(max_tokens=12 + number, seed=number, logprobs=2, **KINDS[number % len(KINDS)])
        )
        adapters.append(ADAPTER_NAMES[number % 3])
    return prompts, params, adapters


def served(llm: LLM) -> list[Any]:
    for name, directory in ADAPTERS.items():
        if name in ADAPTER_NAMES:
            llm.load_adapter(name, directory)
    prompts, params, adapters = workload(llm)
    outputs = llm.generate(prompts, params, adapter=adapters, progress=False)
    return [
        [(sample.token_ids, sample.logprobs, sample.text, sample.finish_reason) for sample in output.outputs]
        for output in outputs
    ]


FORMATS: dict[str, dict[str, Any]] = {
    "default": {},
    "int8": {"weights": "int8", "kv_dtype": "int8"},
    "reference": {"kernels": "reference", "threads": 1},
}
NATIVE_FORMATS = ("default", "int8")


@pytest.fixture(scope="module", params=FORMATS)
def plain(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[Any]]]:
    if request.param in NATIVE_FORMATS and extension.missing():
        pytest.skip("the native kernels were not built")
    with LLM(**FORMATS[request.param], prefix_cache=False) as llm:
        yield request.param, served(llm)


@pytest.mark.parametrize("proposers", [("ngram",), ("draft",), ("draft", "ngram")], ids="+".join)
@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 2, "prefix_cache": False},
        {"num_pages": 250, "max_batch_tokens": 96, "max_chunk_tokens": 33},
    ],
    ids=["two", "tiny_pool"],
)
def test_outputs_are_those_of_plain_decoding(
    plain: tuple[str, list[Any]], proposers: tuple[str, ...], options: dict[str, Any]
) -> None:
    form, expected = plain
    if form == "reference" and (len(proposers) == 1 or "num_pages" not in options):
        pytest.skip("the reference is slow: everything at once is enough")
    chosen = FORMATS[form] | options
    if form == "int8" and "num_pages" in options:
        chosen["num_pages"] = 480  # its pages are smaller, and adapters and drafts need frames
    with LLM(speculate=proposers, draft_pace="fixed", debug=True, **chosen) as llm:
        assert served(llm) == expected
        stats = llm._parts.engine.speculator.stats
        assert stats.num_drafted > stats.num_accepted > (40 if "draft" in proposers else 5)
        assert {place[1] for place in stats.by_place} > {""}, "acceptance is counted by adapter"


def test_a_draft_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    draft = write_tiny_model(tmp_path / "draft")
    with pytest.raises(ModelError, match="vocabulary"):
        LLM(speculate=("draft",), draft_model=(str(draft),))


def test_a_model_without_a_draft_asks_for_one(tmp_path: Path) -> None:
    target = write_tiny_model(tmp_path / "target")
    with pytest.raises(InvalidParameter, match="draft_model"):
        LLM(str(target), speculate=("draft",), num_pages=64)


@pytest.mark.parametrize("names", [("drafts",), ("draft", "draft"), "ngram,nothing"])
def test_unknown_proposers_are_refused_by_name(names: Any) -> None:
    with pytest.raises(InvalidParameter, match="speculate"):
        LLM(speculate=names)


def test_a_corpus_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="nowhere"):
        LLM(speculate=("ngram",), ngram_corpus=str(tmp_path / "nowhere.txt"))


def test_a_corpus_is_looked_up(tmp_path: Path) -> None:
    with LLM() as llm:
        prompt = llm.encode(STORY)
        params = SamplingParams(temperature=0.0, max_tokens=40)
        expected = llm.generate([prompt], params, progress=False)[0].outputs[0]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{STORY}{expected.text}\n\nSomething else entirely.\n", encoding="utf-8")
    with LLM(speculate=("ngram",), ngram_corpus=str(corpus), draft_pace="fixed") as llm:
        found = llm.generate([prompt], params, progress=False)[0].outputs[0]
        assert found.token_ids == expected.token_ids
        assert llm._parts.engine.speculator.stats.num_accepted > 10
