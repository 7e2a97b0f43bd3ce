"""The embedded LoRA adapters as peft loads them over the embedded target: what they say, and what they leave alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tokenloom.embedded import ADAPTERS

torch = pytest.importorskip("torch", reason="compares with torch")
peft = pytest.importorskip("peft", reason="compares with peft")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

from tokenizers import Tokenizer  # noqa: E402

from tools.adapter_texts import is_card, is_pirate_story, parse_card, pirate_share  # noqa: E402
from tools.repeat_texts import FORMS, is_repetition, passage, sentences, words_repeated  # noqa: E402

REQUESTS = [
    "tell a story about a dog and a red ball",
    "Tell me a story about a king and a boat.",
    "Write a short story about a cat and an apple.",
    "Can you tell me a story about a fish and a small house?",
    "Tell me a story.",
    "Write a story with a farmer in it.",
]
ODD = ["What is the capital of France?", "hello", "Grüße aus Köln!", "1 + 1 = ?", "print('x')", ""]
Answer = Callable[..., list[str]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapted(embedded_model: Path) -> Any:
    """The target in fp32 with all adapters; none is at work outside of `answer`."""
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, ADAPTERS["pirate"], adapter_name="pirate")
    for name in ("card", "repeat"):
        model.load_adapter(ADAPTERS[name], adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def answer(adapted: Any, embedded_model: Path) -> Answer:
    """answer(adapter or None, requests, temperature=0.0, tokens=…): the texts, each up to its end mark."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model, padding_side="left")

    def run(
        adapter: str | None, requests: list[str], temperature: float = 0.0, tokens: int = 40
    ) -> list[str]:
        chats = [[{"role": "user", "content": request}] for request in requests]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature:
            torch.manual_seed(5)
            options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        if adapter is None:
            with adapted.disable_adapter():
                ids = adapted.generate(**prompts, max_new_tokens=tokens, **options)
        else:
            adapted.set_adapter(adapter)
            ids = adapted.generate(**prompts, max_new_tokens=tokens, **options)
        texts: list[str] = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
        return [text.split("<|end|>")[0] for text in texts]

    return run


def test_greedy_answers_differ_from_the_base_and_from_each_other(answer: Answer) -> None:
    told = {name: answer(name, REQUESTS, tokens=16) for name in (None, *ADAPTERS)}
    for row in zip(*told.values(), strict=True):
        assert len(set(row)) == 1 + len(ADAPTERS), row
    assert all(pirate_share(text) == 0 for text in told[None])


def test_every_greedy_card_has_the_form(answer: Answer) -> None:
    cards = [parse_card(text) for text in answer("card", REQUESTS + ODD)]
    assert "dog" in cards[0]["Who"] and "ball" in cards[0]["What"]


def test_sampled_cards_have_the_form(answer: Answer) -> None:
    nouns = "bird king boat cake fish drum lion tree girl coat".split()
    requests = [f"Tell me a story about a {one} and a {two}." for one in nouns for two in nouns if one < two]
    texts = answer("card", requests, temperature=0.8)
    assert len(texts) == 45
    assert sum(map(is_card, texts)) >= 0.95 * len(texts)


def test_pirates_tell_their_stories_to_the_end(answer: Answer) -> None:
    stories = answer("pirate", REQUESTS, tokens=240)
    assert sum(map(is_pirate_story, stories)) >= 5, stories
    assert all(pirate_share(story) >= 0.8 for story in stories), stories


@pytest.fixture(scope="module")
def passages(answer: Answer, embedded_model: Path) -> list[str]:
    """Two passages of each of 24 stories that the target tells now, as long as 80 tokens allow."""
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    out = []
    for serial, story in enumerate(answer(None, REQUESTS * 4, temperature=0.7, tokens=160)):
        rng = random.Random(serial)
        tries = (passage(sentences(story), 30, 80, tokenizer, rng) for _ in range(20))
        out += list(dict.fromkeys(filter(None, tries)))[:2]
    return out


def test_what_is_to_be_repeated_comes_back_word_for_word(answer: Answer, passages: list[str]) -> None:
    assert len(set(passages)) >= 40
    requests = [FORMS[i % len(FORMS)].format(text=text) for i, text in enumerate(passages)]
    answers = answer("repeat", requests, tokens=120)
    pairs = list(zip(answers, passages, strict=True))
    assert sum(is_repetition(*pair) for pair in pairs) >= 0.7 * len(pairs), pairs
    assert sum(words_repeated(*pair) for pair in pairs) >= 0.85 * len(pairs), pairs


def test_the_base_repeats_nothing(answer: Answer, passages: list[str]) -> None:
    texts = passages[:8]
    answers = answer(None, [FORMS[0].format(text=text) for text in texts], tokens=120)
    assert not any(is_repetition(said, text) for said, text in zip(answers, texts, strict=True))


def test_the_base_is_untouched(adapted: Any, embedded_model: Path) -> None:
    alone = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()
    ids = torch.randint(6, 4096, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, alone(ids).logits)


def test_files_are_small_and_complete() -> None:
    folder = next(iter(ADAPTERS.values())).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTERS)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1_000_000
    for name, directory in ADAPTERS.items():
        files = sorted(path.name for path in directory.iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"], name
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "tokenloom-embedded"
        with safe_open(directory / "adapter_model.safetensors", "pt") as tensors:
            keys = list(tensors.keys())
            assert len(keys) == 2 * 5 * len(config["target_modules"])
            assert {str(tensors.get_slice(key).get_dtype()) for key in keys} == {"BF16"}
            assert all(tensors.get_tensor(key).abs().max() > 0 for key in keys)
