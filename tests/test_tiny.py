"""The one-minute smoke test: the embedded model from the prompt to the text, alone and in company."""

from __future__ import annotations

from tokenloom import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "Tell a story about a dog and a red ball."}]


def test_a_story() -> None:
    with LLM() as llm:
        (greedy,) = llm.chat(MESSAGES, SamplingParams(temperature=0.0, max_tokens=200))
    text = greedy.outputs[0].text
    assert len(text) > 100 and "dog" in text.lower() and "ball" in text.lower()


def test_company_changes_nothing() -> None:
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=40, logprobs=2)
    with LLM(max_running=1, prefix_cache=False) as llm:
        (alone,) = llm.chat(MESSAGES, params)
    with LLM(num_pages=24, max_batch_tokens=48, max_running=8) as llm:
        crowd = llm.chat([MESSAGES] * 6 + [[{"role": "user", "content": "Hello!"}]] * 6, params)
    for other in crowd[:6]:
        assert other.outputs[0].token_ids == alone.outputs[0].token_ids
        assert other.outputs[0].logprobs == alone.outputs[0].logprobs
