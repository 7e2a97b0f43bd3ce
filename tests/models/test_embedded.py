"""The embedded models through the Python face, against transformers (teacher-forced, fp32)."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokenloom
from tokenloom import LLM, SamplingParams

EMBEDDED = Path(tokenloom.__file__).parent / "embedded"
PROMPTS = [
    [{"role": "user", "content": "tell a story about a dog and a red ball"}],
    [{"role": "user", "content": "Write a short story with the words boat, rain and mouse."}],
    [
        {"role": "system", "content": "You are a helpful storyteller."},
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once upon a time there was a small frog."},
        {"role": "user", "content": "Another one about a bird, please."},
    ],
]


@pytest.mark.parametrize("name", ["target", "draft", "draft2"])
def test_greedy_tokens_equal_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    with LLM(str(EMBEDDED / name), dtype="float32") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
        outputs = llm.chat(PROMPTS, params) + llm.generate(["Once upon a time", "The cat"], params)
    for output in outputs:
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        gaps = best.values[:, 0] - best.values[:, 1]
        differs = best.indices[:, 0] != torch.tensor(tokens)
        assert not (differs & (gaps >= 1e-5)).any()


def test_chat_rendering_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(EMBEDDED / "target")
    with LLM() as llm:
        for messages in PROMPTS:
            ours = llm.get_tokenizer().render_chat(messages)
            assert ours == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert llm.encode(ours, add_special_tokens=False) == list(expected)


def test_size_and_sharing() -> None:
    total = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert total <= 16 * 1000 * 1000
    tokenizers = {(EMBEDDED / name / "tokenizer.json").read_bytes() for name in ("target", "draft", "draft2")}
    assert len(tokenizers) == 1
