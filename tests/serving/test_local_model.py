"""From the files of a checkpoint to tokens: in this process, and in an engine process."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.helpers import EOS, VOCAB
from tokenloom import LLM, SamplingParams
from tokenloom.config import make_config
from tokenloom.errors import ContextLengthExceeded, InvalidParameter, ModelError
from tokenloom.serving.assembly import build_engine
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.messages import Loading
from tokenloom.serving.outputs import RequestOutput
from tokenloom.serving.requests import make_request
from tokenloom.serving.supervisor import ProcessEngineClient

PROMPTS = [f"{'lorem ipsum ' * (i % 7)}{i}" for i in range(24)]
PARAMS = [
    SamplingParams(
        seed=i, max_tokens=10 + i % 9, temperature=i % 3 / 2, logprobs=2, n=1 + i % 2, top_k=50 * (i % 2)
    )
    for i in range(24)
]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), num_pages=256) as made:
        yield made


def comparable(outputs: list[RequestOutput]) -> list[object]:
    """What must be equal: tokens, texts and logprobs, bit for bit."""
    return [(output.prompt_token_ids, output.outputs) for output in outputs]


def test_alone_or_together_chunked_or_preempted_it_is_the_same(llm: LLM, tiny_model: Path) -> None:
    together = comparable(llm.generate(PROMPTS, PARAMS))
    alone = [
        comparable(llm.generate(prompt, params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]
    assert together == alone
    for options in (
        {"max_batch_tokens": 16, "max_running": 3, "prefix_cache": False},
        {"num_pages": 16, "max_chunk_tokens": 5},
    ):
        with LLM(str(tiny_model), debug=True, **options) as other:
            assert comparable(other.generate(PROMPTS, PARAMS)) == together


def test_a_thousand_short_prompts(llm: LLM) -> None:
    outputs = llm.generate([[i % 256] for i in range(1000)], SamplingParams(max_tokens=2, temperature=0.0))
    assert len(outputs) == 1000
    first = {output.prompt_token_ids[0]: output.outputs[0].token_ids for output in outputs[:256]}
    assert all(output.outputs[0].token_ids == first[output.prompt_token_ids[0]] for output in outputs)


def test_logprobs_and_defaults(llm: LLM) -> None:
    [output] = llm.generate(
        "abc", SamplingParams(temperature=0.0, max_tokens=3, logprobs=3, prompt_logprobs=1)
    )
    sample = output.outputs[0]
    assert sample.logprobs is not None
    for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert [best.rank for best in entry.values()] == [1, 2, 3]
        assert next(iter(entry)) == token
        assert max(best.logprob for best in entry.values()) == entry[token].logprob < 0
    assert sample.cumulative_logprob == math.fsum(
        entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)
    )
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.9, 20, 1.0)
    assert (params.min_p, params.repetition_penalty) == (0.01, 1.0)
    assert (llm.card.name, llm.card.max_context, llm.card.vocab_size) == ("tiny", 256, VOCAB)


def test_bad_words_never_appear(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0)
    [free] = llm.generate("abc", params)
    tokenizer = llm.get_tokenizer()
    word = next(
        text for text in map(tokenizer.token_text, range(256)) if tokenizer.encode(text, False) == [65]
    )
    biased = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={65: 100})
    [forced] = llm.generate("abc", biased)
    assert forced.outputs[0].token_ids == [65] * 4
    banned = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={65: 100}, bad_words=[word])
    [output] = llm.generate("abc", banned)
    assert 65 not in output.outputs[0].token_ids
    assert free.outputs[0].logprobs is not None


def test_end_of_text(llm: LLM) -> None:
    end = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=2, logit_bias={EOS: 100})
    [output] = llm.generate("abc", end)
    sample = output.outputs[0]
    assert (sample.finish_reason, sample.stop_reason, len(sample.token_ids)) == ("stop", None, 3)
    assert sample.text == llm.get_tokenizer().decode(sample.token_ids[:2])


def test_the_plan_is_told_before_loading(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    class Listener(SilentLoad):
        def plan(self, text: str) -> None:
            heard.append(text)

        def advance(self, stage: str, done: int, total: int) -> None:
            assert 0 < done <= total
            heard.append(stage)

    parts = build_engine(make_config({"model": str(tiny_model), "num_pages": 32}, env={}), Listener())
    parts.engine.close()
    assert "32 pages" in heard[0]
    assert "weights" in heard[1]
    LLM(str(tiny_model), num_pages=32).close()
    assert "32 pages" in capsys.readouterr().err


def test_the_budget_follows_the_target(llm: LLM, tiny_model: Path) -> None:
    with LLM(str(tiny_model), target_itl_ms=1e-6, num_pages=64) as strict:
        assert strict._parts.engine.scheduler.budget.max_batch_tokens == 16
        assert strict.card.max_running == 14
        assert len(strict.generate(["a"] * 30, SamplingParams(max_tokens=3))) == 30
    with LLM(str(tiny_model), target_itl_ms=60_000.0, num_pages=64) as loose:
        assert loose._parts.engine.scheduler.budget.max_batch_tokens == 256
        # What measuring left in the pages is nobody's.
        assert comparable(loose.generate(PROMPTS, PARAMS)) == comparable(llm.generate(PROMPTS, PARAMS))


def test_what_cannot_be_served_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        LLM(str(tmp_path / "absent"))
    with pytest.raises(ModelError):
        LLM(str(tmp_path))
    with pytest.raises(InvalidParameter, match="dtype"):
        LLM(str(tiny_model), dtype="int4")
    with (
        LLM(str(tiny_model), num_pages=4, threads=1) as small,
        pytest.raises(ContextLengthExceeded, match="64"),
    ):
        small.generate([[1] * 100])


async def test_an_engine_process_equals_the_engine_here(
    llm: LLM, tiny_model: Path, importable: None, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = llm.generate(PROMPTS, PARAMS)
    heard: list[Loading] = []
    config = make_config({"model": str(tiny_model), "num_pages": 128, "threads": 1}, env={})
    client = ProcessEngineClient(config, on_loading=heard.append)
    await client.start()

    async def serve(i: int) -> dict[int, list[int]]:
        tokenizer = client.tokenizer
        tokens: dict[int, list[int]] = {}
        request = make_request(tokenizer, tokenizer.encode(PROMPTS[i]), PARAMS[i], request_id=str(i))
        async for delta in client.generate(request):
            tokens.setdefault(delta.sample, []).extend(delta.token_ids)
        return tokens

    try:
        await client.wait_ready(60)
        results = await asyncio.gather(*map(serve, range(len(PROMPTS))))
        maps = Path(f"/proc/{client.process_id}/maps").read_text()
    finally:
        await client.close()
    assert results == [{s.index: s.token_ids for s in output.outputs} for output in expected]
    assert client.card.name == "tiny"
    assert heard[-1].done == heard[-1].total > 0
    assert "128 pages" in capfd.readouterr().err
    assert "numpy" in maps
    assert "torch" not in maps


def test_no_torch_is_imported(tiny_model: Path, importable: None) -> None:
    script = textwrap.dedent("""
        import json, sys
        from tokenloom import LLM, SamplingParams
        import tokenloom.serving.engine_process, tokenloom.serving.supervisor, tokenloom.serving.local_client
        with LLM(sys.argv[1], num_pages=32) as llm:
            output = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=3))
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert not modules & {"torch", "transformers", "pandas", "scipy", "jax", "matplotlib"}
    assert "numpy" in modules
