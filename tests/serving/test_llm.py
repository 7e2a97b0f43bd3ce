"""The Python face on the simulated executor."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.helpers import BOS, EOS, POISON, SlowExecutor, simulated_parts
from tokenloom import LLM, SamplingParams
from tokenloom.config import make_config
from tokenloom.engine.batch import StepResult, Ticket
from tokenloom.errors import ContextLengthExceeded, InvalidParameter, TokenloomError
from tokenloom.serving.outputs import RequestOutput


def make_llm(directory: Path, **options: Any) -> LLM:
    return LLM.from_parts(make_config({}, env={}), simulated_parts(directory, **options))


@pytest.fixture
def llm(tokenizer_directory: Path) -> Iterator[LLM]:
    with make_llm(tokenizer_directory) as made:
        yield made


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def is_clean(llm: LLM) -> bool:
    engine = llm._parts.engine
    engine.check()
    return not engine.has_work and not engine.scheduler.cache.references


def test_every_form_of_prompt(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=4)
    ids = llm.encode("ab")
    forms: list[Any] = [
        "ab",
        ["ab"],
        ids,
        [ids],
        {"prompt": "ab"},
        [{"prompt_token_ids": ids}],
        np.array(ids),
    ]
    results = [llm.generate(form, params) for form in forms]
    assert len({str(tokens(result)) for result in results}) == 1
    assert [result[0].prompt for result in results] == ["ab", "ab", None, None, "ab", None, None]
    assert all(result[0].prompt_token_ids == ids for result in results)
    mixed = llm.generate(["ab", ids, {"prompt": "x", "prompt_token_ids": ids}], params)
    assert [output.prompt for output in mixed] == ["ab", None, "x"]
    assert llm.generate([], params) == []


@pytest.mark.parametrize(
    "prompts",
    [[None], [1.5], {"text": "a"}, {"prompt": 3}, [["a", "b"]], [True], [{"prompt_token_ids": "ab"}]],
)
def test_other_forms_are_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidParameter, match="prompt"):
        llm.generate(prompts)
    assert is_clean(llm)


def test_a_thousand_prompts_get_what_they_get_alone(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    params = [SamplingParams(seed=i, max_tokens=1 + i % 5, n=1 + (i % 7 == 0)) for i in range(1000)]
    together = llm.generate(prompts, params, progress=True)
    assert [output.prompt for output in together] == prompts
    assert all(output.finished for output in together)
    for i in range(0, 1000, 50):
        assert tokens(llm.generate(prompts[i], params[i])) == tokens(together[i : i + 1])
    assert is_clean(llm)
    shown = capsys.readouterr()
    assert "1000/1000" in shown.err
    assert shown.out == ""


def test_no_bar_unless_wanted(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=1)
    llm.generate(["a"] * 20, params)
    llm.generate(["a"] * 20, params, progress=True, use_tqdm=False)
    llm.generate(["a"] * 7, params, progress=True)
    assert capsys.readouterr().err == ""


def test_the_result_as_users_of_vllm_know_it(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=6, n=2, logprobs=0, prompt_logprobs=0)
    [output] = llm.generate("abc", params)
    assert output.finished
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(entry) for entry in output.prompt_logprobs[1:] if entry] == [[t] for t in llm.encode("bc")]
    assert [sample.index for sample in output.outputs] == [0, 1]
    for sample in output.outputs:
        assert len(sample.token_ids) == 6
        assert sample.finish_reason == "length"
        assert sample.stop_reason is None
        assert sample.text == llm.get_tokenizer().decode(sample.token_ids)
        assert sample.cumulative_logprob == pytest.approx(-6.0)
        assert sample.logprobs is not None
        for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
            assert list(entry) == [token]
            assert entry[token].logprob == -1.0
            assert entry[token].rank == 1
            assert entry[token].decoded_token == llm.get_tokenizer().token_text(token)
    assert output.metrics is not None
    assert output.metrics.finished >= output.metrics.first_token >= output.metrics.arrival
    [plain] = llm.generate("abc", SamplingParams(seed=3, max_tokens=6))
    assert plain.outputs[0].logprobs is None
    assert plain.outputs[0].cumulative_logprob is None
    assert plain.prompt_logprobs is None


def test_text_at_stops(llm: LLM) -> None:
    [full] = llm.generate("abc", SamplingParams(seed=4, max_tokens=8))
    ids = full.outputs[0].token_ids
    decode = llm.get_tokenizer().decode
    # A stop string of plain characters, so that it stands in the text as it does in the tokens.
    where = next(i for i, token in enumerate(ids) if decode([token]).isascii() and token not in ids[:i])
    stop = decode([ids[where]])
    [stopped] = llm.generate("abc", SamplingParams(seed=4, max_tokens=8, stop=stop))
    sample = stopped.outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.token_ids == ids[: where + 1]
    assert sample.text == decode(ids[:where])
    [kept] = llm.generate(
        "abc", SamplingParams(seed=4, max_tokens=8, stop=[stop], include_stop_str_in_output=True)
    )
    assert kept.outputs[0].text == decode(ids[: where + 1])
    [later] = llm.generate("abc", SamplingParams(seed=4, max_tokens=8, stop=[stop], min_tokens=8))
    assert later.outputs[0].token_ids == ids
    [by_id] = llm.generate("abc", SamplingParams(seed=4, max_tokens=8, stop_token_ids=[ids[2]]))
    assert by_id.outputs[0].stop_reason == ids[2]
    assert by_id.outputs[0].token_ids == ids[:3]
    assert by_id.outputs[0].text == decode(ids[:2])


def test_chat_renders_the_template(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=2)
    question = {"role": "user", "content": "hi"}
    [one] = llm.chat([question], params)
    assert one.prompt == "<user>hi\n<assistant>"
    assert one.prompt_token_ids == llm.encode("<user>hi\n<assistant>", add_special_tokens=False)
    many = llm.chat([[question], [question, {"role": "assistant", "content": "yes"}, question]], params)
    assert [output.prompt for output in many] == [
        "<user>hi\n<assistant>",
        "<user>hi\n<assistant>yes\n<user>hi\n<assistant>",
    ]
    [continued] = llm.chat(
        [question, {"role": "assistant", "content": "ye"}],
        params,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert continued.prompt == "<user>hi\n<assistant>ye"
    with pytest.raises(InvalidParameter, match="add_generation_prompt"):
        llm.chat([question], params, continue_final_message=True)
    with pytest.raises(InvalidParameter, match="messages"):
        llm.chat([], params)


def test_one_invalid_request_leaves_the_engine_as_it_was(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded, match="512"):
        llm.generate(["fine", [1] * 600], SamplingParams(max_tokens=3))
    assert is_clean(llm)
    with pytest.raises(InvalidParameter, match="stop_token_ids"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(stop_token_ids=[-1])])
    with pytest.raises(InvalidParameter, match="sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(InvalidParameter, match="sampling_params"):
        llm.generate("a", [{"temperature": 1}])  # type: ignore[list-item]
    with pytest.raises(InvalidParameter, match="prompt"):
        llm.generate("")
    assert is_clean(llm)


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="tensor_parallel_size"):
        LLM("", tensor_parallel_size=2)
    with pytest.raises(InvalidParameter, match="max_batch_tokens"):
        LLM("", max_batch_tokens=0)


class _Interrupting(SlowExecutor):
    """Presses Ctrl-C in the third step."""

    num_steps = 0

    def collect(self, ticket: Ticket) -> StepResult:
        self.num_steps += 1
        if self.num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().collect(ticket)


def test_ctrl_c_cancels_after_the_step(tokenizer_directory: Path) -> None:
    parts = simulated_parts(tokenizer_directory)
    executor = parts.engine.executor = _Interrupting()
    llm = LLM.from_parts(make_config({}, env={}), parts)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 50, SamplingParams(max_tokens=100))
    assert signal.getsignal(signal.SIGINT) is before
    assert executor.num_steps == 3
    assert is_clean(llm)
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3


def test_a_failing_step_leaves_the_engine_clean(llm: LLM) -> None:
    with pytest.raises(RuntimeError, match="poisoned"):
        llm.generate([[1, 2], [POISON]], SamplingParams(max_tokens=3))
    assert is_clean(llm)
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3


def test_seeds_are_reproducible(tokenizer_directory: Path) -> None:
    def sampled(base: int) -> list[list[list[int]]]:
        with make_llm(tokenizer_directory, seed=base) as llm:
            return tokens(llm.generate(["a"] * 3, SamplingParams(max_tokens=8)))

    assert sampled(5) == sampled(5)
    assert sampled(5)[0] != sampled(5)[1]
    assert sampled(-1) != sampled(-1)


def test_more_requests_than_the_queue_holds(tokenizer_directory: Path) -> None:
    with make_llm(tokenizer_directory, max_running=2, max_waiting=1) as llm:
        outputs = llm.generate(["a"] * 100, SamplingParams(max_tokens=2, seed=1))
    assert len(outputs) == 100
    assert len({str(tokens([output])) for output in outputs}) == 1


def test_threads_take_turns(llm: LLM) -> None:
    results: dict[int, list[RequestOutput]] = {}

    def work(i: int) -> None:
        results[i] = llm.generate(["a"] * 20, SamplingParams(max_tokens=4, seed=i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({str(tokens(result)) for result in results.values()}) == 4
    assert is_clean(llm)


def test_after_close(llm: LLM) -> None:
    llm.close()
    llm.close()
    executor = llm._parts.engine.executor
    assert isinstance(executor, SlowExecutor)
    assert executor.closed
    with pytest.raises(TokenloomError, match="closed"):
        llm.generate("a")


def test_special_tokens_in_the_output(llm: LLM) -> None:
    forced = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
    [output] = llm.generate([[BOS, EOS, 1]], forced)
    assert output.prompt_token_ids == [BOS, EOS, 1]
