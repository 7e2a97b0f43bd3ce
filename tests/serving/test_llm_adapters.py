"""Adapters from the Python face down to the kernels: peft is the oracle, and nobody else's output changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.helpers import write_tiny_model
from tests.serving.peft_adapters import their_logits, write_adapter
from tokenloom import LLM, SamplingParams
from tokenloom.serving.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)
PROMPTS = [[1 + i, 70, 9, 200 - i, 33, 33, 5] for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {f"a{i}": write_adapter(folder / f"a{i}", i, rank=1 + 3 * i) for i in range(4)}


def make_llm(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **({"dtype": "float32", "threads": 1, "debug": True, "num_pages": 2048} | options))


@pytest.fixture(scope="module", params=["native", "reference"])
def llm(request: pytest.FixtureRequest, model: Path, adapters: dict[str, Path]) -> Iterator[LLM]:
    with make_llm(model, kernels=request.param) as made:
        for name, directory in adapters.items():
            made.load_adapter(name, directory)
        yield made


def seen(outputs: list[RequestOutput]) -> list[Any]:
    """Everything that must be equal."""
    return [
        [(sample.token_ids, sample.logprobs, sample.text, sample.finish_reason) for sample in output.outputs]
        for output in outputs
    ]


def agree_with_peft(model: Path, adapter: Path | None, output: RequestOutput) -> int:
    """Tokens that must be equal, as the best two logits of peft are further apart than 1e-5."""
    sample = output.outputs[0]
    assert output.prompt_token_ids is not None
    tokens = [*output.prompt_token_ids, *sample.token_ids]
    logits = their_logits(model, adapter, tokens).astype(np.float64)
    start = len(output.prompt_token_ids) - 1
    checked = 0
    assert sample.logprobs is not None
    for i, (token, found) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        row = logits[start + i]
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for other, entry in found.items():
            assert abs(entry.logprob - logprobs[other]) < 2e-5
        best, second = np.sort(row)[::-1][:2]
        if best - second > 1e-5:
            assert token == row.argmax()
            checked += 1
    return checked


def test_outputs_are_those_of_peft(llm: LLM, model: Path, adapters: dict[str, Path]) -> None:
    names = [None, *adapters, None]
    outputs = llm.generate(PROMPTS, GREEDY, adapter=names)
    checked = sum(
        agree_with_peft(model, adapters[name] if name else None, output)
        for name, output in zip(names, outputs, strict=True)
    )
    assert checked > 60
    assert len({str(sample.token_ids) for output in outputs for sample in output.outputs}) == len(PROMPTS)


def test_base_rows_do_not_know_of_adapters(llm: LLM, model: Path, adapters: dict[str, Path]) -> None:
    """They are bit for bit those of an engine that never saw one."""
    with make_llm(model, kernels=llm.config.runtime.kernels) as plain:
        expected = seen(plain.generate(PROMPTS, GREEDY))
    outputs = llm.generate(
        [*PROMPTS, *PROMPTS], GREEDY, adapter=[None] * 6 + ["a1", "a2", "a3", "a0", "a1", "a2"]
    )
    assert seen(outputs[:6]) == expected
