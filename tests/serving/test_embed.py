"""Embeddings through `LLM`, and through an engine process that dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.helpers import BOS, POISON, VOCAB, collect, request, simulated_parts, write_tiny_model
from tests.serving.test_supervisor import serving
from tokenloom import LLM, SamplingParams
from tokenloom.config import make_config
from tokenloom.engine.pooling import vector_of
from tokenloom.engine.request import Pooling, Request, SequenceDelta
from tokenloom.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidParameter,
    ModelError,
    TokenloomError,
    UnsupportedFeature,
)
from tokenloom.serving.journal import Journal
from tokenloom.serving.requests import SeedSource, embedding_request

PROMPTS = [f"{'lorem ipsum ' * (i % 7)}{i}" for i in range(24)]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), num_pages=256) as made:
        yield made


# --- LLM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_equal_those_of_transformers(llm: LLM, tiny_model: Path, pooling: Pooling) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle here")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    model = transformers.LlamaModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    outputs = llm.embed(PROMPTS[:8], pooling=pooling, normalize=False)
    units = llm.embed(PROMPTS[:8], pooling=pooling)
    for output, unit in zip(outputs, units, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        vector = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)
        direction = torch.nn.functional.normalize(vector, dim=0)
        torch.testing.assert_close(torch.tensor(unit.outputs.embedding), direction, rtol=1e-6, atol=1e-7)
        assert output.outputs.hidden_size == 32
        assert output.finished and output.prompt is not None


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_alone_or_together_chunked_or_preempted_it_is_the_same(
    llm: LLM, tiny_model: Path, pooling: Pooling
) -> None:
    together = [output.outputs for output in llm.embed(PROMPTS, pooling=pooling)]
    assert [llm.embed(prompt, pooling=pooling)[0].outputs for prompt in PROMPTS] == together
    for options in (
        {"max_batch_tokens": 16, "max_running": 3, "prefix_cache": False, "threads": 1},
        {"num_pages": 16, "max_chunk_tokens": 5, "pooling_type": pooling},
    ):
        with LLM(str(tiny_model), debug=True, **options) as other:
            given = None if "pooling_type" in options else pooling
            assert [output.outputs for output in other.embed(PROMPTS, pooling=given)] == together


def test_forms_of_prompts(llm: LLM) -> None:
    ids = llm.encode("abc")
    outputs = [
        llm.embed(prompt)[0] for prompt in ("abc", ids, {"prompt": "abc"}, {"prompt_token_ids": ids}, ["abc"])
    ]
    assert all(output.outputs == outputs[0].outputs for output in outputs)
    assert [output.prompt for output in outputs] == ["abc", None, "abc", None, "abc"]
    assert llm.embed([]) == []


def test_a_cached_prefix_is_used_for_last(llm: LLM) -> None:
    text = "one more text that nobody has asked for before"
    first, second = (llm.embed(text)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, len(text) // 16 * 16)
    assert first.outputs == second.outputs
    assert llm.embed(text, pooling="mean")[0].num_cached_tokens == 0


def test_truncation_keeps_the_beginning(llm: LLM) -> None:
    long = "x" * 1000
    assert len(llm.embed(long, truncate_prompt_tokens=-1)[0].prompt_token_ids) == 256
    short = llm.embed([long, [5] * 9, "a"], truncate_prompt_tokens=4)
    assert [output.prompt_token_ids for output in short] == [llm.encode("xxxx"), [5] * 4, llm.encode("a")]
    for bad in (0, -2, 257, 1.5, True):
        with pytest.raises(InvalidParameter, match="truncate_prompt_tokens"):
            llm.embed("a", truncate_prompt_tokens=bad)  # type: ignore[arg-type]


def test_what_cannot_be_embedded_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded, match="256"):
        llm.embed(["ok", "x" * 257])
    assert len(llm.embed("x" * 256)[0].prompt_token_ids) == 256
    for bad in ("", [[]], [[VOCAB]], [[-1]]):
        with pytest.raises(InvalidParameter):
            llm.embed(bad)
    with pytest.raises(UnsupportedFeature, match="dimensions"):
        llm.embed("a", dimensions=8)
    with pytest.raises(InvalidParameter, match="pooling"):
        llm.embed("a", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="pooling_type"):
        make_config({"pooling_type": "max"}, env={})


def test_a_matryoshka_model_says_so_in_its_configuration(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "cut")
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"matryoshka_dimensions": [16, 8]}))
    with LLM(str(directory), num_pages=32) as llm:
        [whole, short] = (llm.embed("abc", normalize=False, dimensions=d)[0].outputs for d in (None, 8))
        assert short.embedding == whole.embedding[:8]
        with pytest.raises(InvalidParameter, match="one of 8, 16"):
            llm.embed("abc", dimensions=9)
    for broken in ([0], [33], "8", [True]):
        file.write_text(json.dumps(config | {"matryoshka_dimensions": broken}))
        with pytest.raises(ModelError, match="matryoshka_dimensions"):
            LLM(str(directory))


def test_embeddings_take_no_seeds_from_others() -> None:
    seeds = SeedSource(3)
    fresh = SeedSource(3)
    assert seeds.fill(embedding_request([1], "mean", request_id="r").params).seed == 0
    assert seeds.fill(SamplingParams()).seed == fresh.fill(SamplingParams()).seed


def test_a_hidden_state_that_is_not_finite_has_no_embedding(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tokenloom.engine.sequence.mean_bytes", lambda total, count: np.array([1, np.inf], "<f4").tobytes()
    )
    with pytest.raises(TokenloomError, match="not finite"):
        llm.embed("a")


def test_truncated_text_keeps_the_special_tokens_around_it(tmp_path: Path) -> None:
    import tokenizers

    from tests.serving.helpers import write_tokenizer
    from tokenloom.text.tokenizer import Tokenizer

    directory = write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", BOS + 1)]
    )
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(directory)
    inner = tokenizer.encode("abcdef", False)
    backend.enable_truncation(6)
    for text in ("abcdef", "", "</s></s></s></s></s>", "ab"):
        [found] = tokenizer.encode_truncated([text], 6)
        assert found == backend.encode(text).ids
    assert tokenizer.encode_truncated(["abcdef"], 6) == [[BOS, BOS, *inner[:3], BOS + 1]]
    assert tokenizer.encode_truncated(["abcdef"], 4, False) == [inner[:4]]
    with pytest.raises(InvalidParameter, match="at least 4"):
        tokenizer.encode_truncated(["abcdef"], 3)


# --- an engine that dies ---------------------------------------------------------------------------------

died = pytest.mark.usefixtures("importable")


def embedding(name: str, prompt: Any, pooling: Pooling = "mean") -> Request:
    return embedding_request(list(prompt), pooling, request_id=name)


async def vector(deltas: AsyncIterator[SequenceDelta]) -> list[float]:
    [delta] = [delta async for delta in deltas]
    assert delta.last
    assert delta.embedding is not None
    found: list[float] = vector_of(delta.embedding).tolist()
    return found


def vector_alone(directory: Path, wanted: Request) -> list[float]:
    engine = simulated_parts(directory).engine
    engine.add_request(wanted)
    while True:
        for delta in engine.step():
            assert delta.embedding is not None
            return vector_of(delta.embedding).tolist()  # type: ignore[no-any-return]


@died
async def test_embeddings_outlive_the_engine(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory, "0.05") as client:
        generating = client.generate(request("g", max_tokens=500))
        await anext(generating)
        wanted = [
            embedding(f"e{i}", [j % 250 for j in range(400)], "mean" if i % 2 else "last") for i in range(20)
        ]
        tasks = [asyncio.create_task(vector(client.generate(entry))) for entry in wanted]
        await asyncio.sleep(0.06)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await collect(generating)
        assert client.state == "restarting"
        with pytest.raises(EngineDead, match="restarting"):
            await collect(client.generate(request("meanwhile")))
        # What comes now waits for the next engine.
        wanted.append(embedding("late", [3, 4, 5]))
        tasks.append(asyncio.create_task(vector(client.generate(wanted[-1]))))
        await asyncio.sleep(0)
        assert client.num_in_flight == len([task for task in tasks if not task.done()])
        unfinished = [task for task in tasks[:-1] if not task.done()]
        assert unfinished
        leaver = unfinished.pop()
        leaver.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert client.num_restarts == 1
        assert client.num_in_flight == 0
        assert len(client.journal) == 0
    for task, entry, result in zip(tasks, wanted, found, strict=True):
        if task is not leaver:
            assert result == vector_alone(tokenizer_directory, entry)


@died
async def test_an_embedding_that_kills_the_engine_is_tried_twice(tokenizer_directory: Path) -> None:
    async with serving(tokenizer_directory) as client:
        with pytest.raises(EngineDead, match="poisoned step"):
            await vector(client.generate(embedding("poison", [1, POISON])))
        await client.wait_ready()
        assert client.num_restarts == 2
        assert len(await vector(client.generate(embedding("fine", [1, 2])))) == 8


def test_the_journal_keeps_what_it_is_told_to() -> None:
    journal = Journal()
    for name in ("a", "b", "c"):
        journal.open(embedding(name, [1]))
    dropped = journal.drop_all(lambda entry: entry.request.request_id == "b")
    assert [entry.request.request_id for entry in dropped] == ["a", "c"]
    assert [entry.request.request_id for entry in journal] == ["b"]
    assert len(journal.drop_all()) == 1
    assert len(journal) == 0
