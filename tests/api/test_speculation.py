"""A server that speculates answers what one without does, token for token, through the official client."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import pre_tokenizers

from tests.api.helpers import SECONDS, Server, serve, serve_model, wait_until
from tokenloom.api.speculation_metrics import SpeculationMetrics
from tokenloom.engine.plan import PlaceCounts, StepRecord, StepSpeculation
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.speculator import Speculator
from tokenloom.runtime.simulated import CostModel

# The tiny model's tokenizer counts the characters that stand for bytes in sorted order.
LETTERS = [sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in "abcdeĠ"]
STORY = "the cat sat on the mat. the cat sat on the hat. the cat sat"
OPTIONS: dict[str, Any] = {"num_pages": 96, "threads": 1, "max_batch_tokens": 64}
SPECULATION: dict[str, Any] = {"speculate": ("ngram",), "ngram_min_match": 1}

# What the two endpoints share; each is asked whole and as a stream.
SHARED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "seed": 5},
    "three samples": {"temperature": 0.9, "seed": 1, "n": 3},
    "penalties": {"temperature": 0, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "bias": {"temperature": 0, "logit_bias": {"97": 2.5, "98": -100}},
    "repetition penalty": {"temperature": 0, "extra_body": {"repetition_penalty": 1.05, "min_p": 0.1}},
    "allowed": {"temperature": 0.3, "seed": 3, "extra_body": {"allowed_token_ids": LETTERS}},
    "bad words": {"temperature": 0, "extra_body": {"allowed_token_ids": LETTERS, "bad_words": ["aa", "bc"]}},
    "min tokens": {
        "temperature": 0,
        "stop": ["a", " ", "b", "c", "d", "e"],
        "extra_body": {"allowed_token_ids": LETTERS, "min_tokens": 21},
    },
    "stop tokens": {
        "temperature": 0.5,
        "seed": 11,
        "extra_body": {"allowed_token_ids": LETTERS, "stop_token_ids": [LETTERS[3]], "min_tokens": 6},
    },
    "end of text": {"temperature": 0.9, "seed": 2, "extra_body": {"ignore_eos": False, "top_k": 5}},
    "slo": {"temperature": 0, "extra_body": {"slo": {"tpot_ms": 5, "ttft_ms": 100}}},
}


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Server]:
    with serve_model(tiny_model, **OPTIONS) as server:
        yield server


@pytest.fixture(scope="module", params=["fixed", "adaptive"])
def guessing(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve_model(tiny_model, draft_pace=request.param, **SPECULATION, **OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def steady(tiny_model: Path) -> Iterator[Server]:
    """A server that guesses in every step."""
    with serve_model(tiny_model, draft_pace="fixed", **SPECULATION, **OPTIONS) as server:
        yield server


def ask(server: Server, path: str, body: dict[str, Any], *, stream: bool = False) -> Any:
    """The answer, or the chunks of a stream with their usage."""
    body = {"max_tokens": 48, **body}
    extra = {"return_token_ids": True, "ignore_eos": True, **body.pop("extra_body", {})}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    client = client_of(server.url)
    if path == "chat":
        messages = [{"role": "user", "content": STORY}]
        answer: Any = client.chat.completions.create(  # type: ignore[call-overload]
            model="", messages=messages, logprobs=True, top_logprobs=3, extra_body=extra, **body
        )
    else:
        prompt = body.pop("prompt", STORY)
        answer = client.completions.create(model="", prompt=prompt, logprobs=3, extra_body=extra, **body)
    return list(answer) if stream else answer


@functools.cache
def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def choices(answer: Any) -> list[dict[str, Any]]:
    return [choice.model_dump() for choice in answer.choices]


def joined(chunks: list[Any], *, echo: bool = False) -> dict[int, dict[str, Any]]:
    """What a stream says of each choice, however it was cut into chunks."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found = whole.setdefault(choice.index, {"text": "", "tokens": [], "logprobs": [], "end": None})
            assert found["end"] is None
            found["text"] += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            found["tokens"] += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None:
                said = choice.logprobs.model_dump()
                entries = said.get("content") or [*zip(*(said[name] for name in sorted(said)), strict=True)]
                # One entry per token, with the chunk that has the token; those of an echo come first.
                echoed = getattr(choice, "prompt_token_ids", None) if echo else None
                assert len(entries) == len(choice.token_ids) + len(echoed or ())
                found["logprobs"] += entries
            if choice.finish_reason is not None:
                found["end"] = (choice.finish_reason, getattr(choice, "stop_reason", None))
    return whole


def prediction(usage: Any) -> tuple[int, int]:
    details = usage.completion_tokens_details
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("name", SHARED)
def test_answers_are_equal(plain: Server, guessing: Server, path: str, name: str) -> None:
    expected, found = (ask(server, path, SHARED[name]) for server in (plain, guessing))
    assert choices(found) == choices(expected)
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert expected.usage.completion_tokens_details is None
    assert min(prediction(found.usage)) >= 0


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("name", SHARED)
def test_streams_are_equal(plain: Server, guessing: Server, path: str, name: str) -> None:
    expected, found = (ask(server, path, SHARED[name], stream=True) for server in (plain, guessing))
    assert joined(found) == joined(expected)
    assert joined(found).keys() == set(range(SHARED[name].get("n", 1)))
    usage = found[-1].usage
    assert usage.completion_tokens == expected[-1].usage.completion_tokens
    assert usage.completion_tokens == sum(len(one["tokens"]) for one in joined(found).values())
    assert expected[-1].usage.completion_tokens_details is None
    assert min(prediction(usage)) >= 0


def test_it_does_speculate(steady: Server) -> None:
    """The tests above compare something: tokens come several at a time, and the usage says so."""
    whole = ask(steady, "completions", SHARED["greedy"])
    chunks = ask(steady, "completions", SHARED["greedy"], stream=True)
    accepted, rejected = prediction(whole.usage)
    assert prediction(chunks[-1].usage) == (accepted, rejected)
    sizes = [len(choice.token_ids) for chunk in chunks for choice in chunk.choices if choice.token_ids]
    # Each step after the first gives a token of its own beside those that were guessed.
    assert sum(sizes) == 48 == len(sizes) + accepted
    assert max(sizes) > 2
    assert accepted > 10


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_that_end_among_accepted_tokens(
    plain: Server, steady: Server, length: int, include: bool
) -> None:
    body: dict[str, Any] = {
        "temperature": 0,
        "extra_body": {"allowed_token_ids": LETTERS, "include_stop_str_in_output": include},
    }
    chunks = ask(steady, "completions", body, stream=True)
    groups = [choice.token_ids for chunk in chunks for choice in chunk.choices if choice.token_ids]
    text = steady.client.tokenizer.decode([token for group in groups for token in group])
    # It ends one token before the end of the longest group, so that some of what was guessed right is dropped.
    longest = max(range(len(groups)), key=lambda number: len(groups[number]))
    assert len(groups[longest]) > 2
    end = sum(map(len, groups[: longest + 1])) - 1
    body |= {"stop": [text[end - length : end], "zz"], "max_tokens": 48}
    expected, found = (ask(server, "completions", body) for server in (plain, steady))
    assert choices(found) == choices(expected)
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].stop_reason == text[end - length : end]
    streams = [joined(ask(server, "completions", body, stream=True)) for server in (plain, steady)]
    assert streams[0] == streams[1]
    assert streams[0][0]["text"] == found.choices[0].text


def test_prompts_echo_and_scores(plain: Server, steady: Server) -> None:
    body = {
        "prompt": [STORY, "a b a b a b a", "xyzxyzxyz"],
        "echo": True,
        "n": 2,
        "seed": 4,
        "temperature": 0.4,
        "extra_body": {"prompt_logprobs": 2},
    }
    expected, found = (ask(server, "completions", body) for server in (plain, steady))
    assert choices(found) == choices(expected)
    assert len(found.choices) == 6
    body["extra_body"] = {}
    streams = [joined(ask(server, "completions", body, stream=True), echo=True) for server in (plain, steady)]
    assert streams[0] == streams[1]


def test_usage_on_every_chunk_grows(steady: Server) -> None:
    body = {"prompt": STORY, "max_tokens": 40, "temperature": 0, "n": 2, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = steady.events("/v1/completions", {**body, "stream_options": options})
    seen = [event["usage"]["completion_tokens_details"] for event in events]
    for name in ("accepted_prediction_tokens", "rejected_prediction_tokens"):
        counts = [details[name] for details in seen]
        assert counts == sorted(counts)
    assert seen[-1]["accepted_prediction_tokens"] > 0


def test_no_figures_without_speculation(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).json()
    assert "completion_tokens_details" not in answer["usage"]
    assert not any("spec_decode" in name for name, *_ in samples(server))


# --- metrics ---------------------------------------------------------------------------------------------


def samples(server: Server) -> dict[tuple[str, ...], float]:
    """The values of /metrics by name and labels (in the order of their names), without the model's."""
    values: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "le"))
            if not sample.name.endswith("_bucket"):
                values[(sample.name.removeprefix("tokenloom_"), *labels)] = sample.value
    return values


def test_metrics(tiny_model: Path) -> None:
    with serve_model(tiny_model, draft_pace="fixed", **SPECULATION, **OPTIONS) as server:
        answers = [
            ask(server, "completions", {"temperature": 0.4, "seed": seed, "n": 1 + seed % 2})
            for seed in range(5)
        ]
        accepted, rejected = (
            sum(column) for column in zip(*(prediction(a.usage) for a in answers), strict=True)
        )
        num_tokens = sum(answer.usage.completion_tokens for answer in answers)
        num_prompt = sum(answer.usage.prompt_tokens for answer in answers)
        num_cached = sum(answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
        wait_until(server.is_idle)
        wait_until(lambda: samples(server)["generation_tokens_total",] == num_tokens)
        got = samples(server)
    assert got["spec_decode_num_draft_tokens_total",] == accepted + rejected
    assert got["spec_decode_num_accepted_tokens_total",] == accepted > 0
    by_position = [value for (name, *_), value in got.items() if name.endswith("per_pos_total")]
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True)
    drafts = got["spec_decode_num_drafts_total",]
    assert by_position[0] <= drafts < got["spec_decode_num_draft_tokens_total",]
    assert 0 < got["spec_decode_steps_total", "yes"] <= drafts
    # One proposer and no adapter: every tree was its own, and so was every token that came true.
    for name, *place in got:
        if name == "spec_decode_proposals_tested_total":
            adapter, position, proposer = place
            came_true = got["spec_decode_proposals_accepted_total", *place]
            assert (adapter, proposer) == ("", "ngram")
            assert came_true == got.get(("spec_decode_num_accepted_tokens_per_pos_total", position), 0)
            assert came_true <= got[name, *place]
            if came_true:
                by_position.remove(came_true)
    assert not any(by_position)
    # Rows by work: the first token of a choice comes from a prompt's row, any other from a decode row or a guess.
    rows = {work: got["step_rows_total", work] for work in ("prefill", "decode", "verify")}
    assert rows["verify"] == accepted + rejected
    assert num_tokens == sum(1 + seed % 2 for seed in range(5)) + rows["decode"] + accepted
    assert rows["prefill"] == num_prompt - num_cached
    assert got["iteration_tokens_total_sum",] == sum(rows.values())
    assert ("spec_decode_seconds_saved",) in got


class Wrong:
    """Guesses one token that never comes."""

    name = "wrong"

    def propose(self, wanted: Sequence[Wanted]) -> list[Proposal]:
        return [Proposal([0], [-1], [0], [0.5]) for _ in wanted]

    def forget(self, seq: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_metrics_say_that_it_switched_itself_off(tokenizer_directory: Path) -> None:
    """What never comes true is not worth a row: most steps are without trees, and are counted as such."""
    with serve(tokenizer_directory) as server:
        server.executor.cost = CostModel(memory_bound=0.0, per_row=0.01)
        server.engine.speculate(Speculator([Wrong()], clock=server.engine.clock))
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 400})
        assert answer.status_code == 200
        wait_until(lambda: samples(server)["step_rows_total", "decode"] == 399)
        got = samples(server)
    on, off = got["spec_decode_steps_total", "yes"], got["spec_decode_steps_total", "no"]
    assert on + off == 399
    assert off > on > 0
    assert got["spec_decode_num_accepted_tokens_total",] == 0
    assert got["spec_decode_seconds_saved",] <= 0


def test_adapters_have_a_bounded_number_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenloom.api.speculation_metrics.MAX_ADAPTERS", 2)
    registry = CollectorRegistry()
    names = {"c1": "red", "c2": "blue", "c3": "green", "c4": "red"}
    metrics = SpeculationMetrics(registry, names.get)

    def step(*adapters: str) -> None:
        places = [PlaceCounts("ngram", adapter, 1, 3, 2) for adapter in adapters]
        metrics.on_step("m", record(StepSpeculation(len(places), [2 * len(places)], places)))

    def tested(adapter: str) -> float | None:
        labels = {"model_name": "m", "proposer": "ngram", "adapter": adapter, "position": "0"}
        return registry.get_sample_value("tokenloom_spec_decode_proposals_tested_total", labels)

    step("", "gone", "c1", "c2", "c3")
    assert [tested(name) for name in ("", "red", "blue", "green", "_other")] == [3, 3, 3, None, 6]
    # A new content under a known name counts for that name, and what had no room for a label gets none later.
    names["gone"] = "blue"
    step("c4", "c3", "gone")
    assert [tested(name) for name in ("", "red", "blue", "green", "_other")] == [3, 6, 6, None, 9]


def test_seconds_saved_may_fall() -> None:
    registry = CollectorRegistry()
    metrics = SpeculationMetrics(registry, lambda content_id: None)
    for seconds in (0.5, -2.0):
        metrics.on_step("m", record(StepSpeculation(1, [0], [], seconds_saved=seconds)))
    name = "tokenloom_spec_decode_seconds_saved"
    assert registry.get_sample_value(name, {"model_name": "m"}) == -1.5


def record(speculation: StepSpeculation) -> StepRecord:
    counts = [0] * 12
    return StepRecord(0, 0.0, *counts, {}, verify_rows=5, speculation=speculation)
