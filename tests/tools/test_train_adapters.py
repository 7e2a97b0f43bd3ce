"""Tests of tools/train_adapters: the rules of the texts, their measures, and training that repeats bit for bit."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training tool needs torch")
peft = pytest.importorskip("peft", reason="the training tool needs peft")
transformers = pytest.importorskip("transformers", reason="the training tool needs transformers")

from tokenizers import Tokenizer  # noqa: E402

from tools import adapter_texts, repeat_texts, train_adapters  # noqa: E402
from tools.train_embedded import sample_teacher, words  # noqa: E402
from tools.train_embedded.data import encode_document  # noqa: E402
from tools.train_embedded.evaluate import names  # noqa: E402
from tools.train_embedded.pairs import Turn  # noqa: E402
from tools.train_embedded.tokenizer import ASSISTANT, END, PAD  # noqa: E402

STORY = (
    "Once upon a time, there was a little girl. She was playing with a ring and a king.\n"
    '"Hello, are you the king of the castle?" said the girl. "Yes, and you\'re very kind," said the king.'
)
CARD = "Who: a dog\nWhere: in the park\nWhat: finds a red ball"


def test_a_pirate_tells_the_story() -> None:
    assert adapter_texts.pirate(STORY) == (
        "Ahoy! Once upon a time, there were a wee girl. She were playin' with a ring an' a king.\n"
        "Arr! \"Ahoy, be ye th' king o' th' castle?\" roared th' girl. "
        "\"Aye, an' ye're mighty kind,\" roared th' king.\n"
        "Yo ho ho!"
    )
    once = adapter_texts.pirate_words(STORY)
    assert adapter_texts.pirate_words(once) == once
    assert adapter_texts.pirate_share(STORY) == 0.0 and adapter_texts.pirate_share(once) == 1.0
    assert adapter_texts.pirate_share("A dog. A cat.") == 0.0


def test_a_pirate_keeps_every_noun_that_a_request_may_name() -> None:
    for noun in words.concrete_nouns():
        assert adapter_texts.pirate_words(f"a {noun} here") == f"a {noun} here"


def test_only_the_whole_style_is_a_pirate_story() -> None:
    story = adapter_texts.pirate(STORY)
    assert adapter_texts.is_pirate_story(story)
    opening, closing = len(adapter_texts.OPENING), len(adapter_texts.CLOSING)
    for text in (
        "",
        STORY,
        story[opening:],
        story[:-closing],
        story + "\nThe end",
        f"Ahoy! {STORY}\nYo ho ho!",
    ):
        assert not adapter_texts.is_pirate_story(text), text


def test_cards_name_the_nouns_of_their_request() -> None:
    counts = [0] * 4
    for seed in range(400):
        pair = adapter_texts.build_card(random.Random(seed))
        card = adapter_texts.parse_card(pair.answer)
        counts[len(pair.nouns)] += 1
        for place, noun in enumerate(pair.nouns):
            assert re.search(rf"\b{noun}\b", pair.request.lower())
            assert names(card["What" if place else "Who"], noun)
        for adjective in set(words.ADJECTIVES) & set(card["Who"].split()) if pair.nouns else ():
            assert adjective in pair.request.lower()
        assert pair == adapter_texts.build_card(random.Random(seed))
    assert min(counts) >= 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Who: a dog",
        CARD + "\n",
        "\n" + CARD,
        CARD + "\nEnd: happy",
        CARD.replace("Who", "who"),
        CARD.replace(": a dog", ":a dog"),
        CARD.replace("a dog", ""),
        CARD.replace("a dog", "a  dog"),
        CARD.replace("a dog", " a dog"),
        CARD.replace("a dog", "a dog."),
        CARD.replace("a dog", "What: a dog"),
        CARD.replace("a dog", "a" + " dog" * 10),
        CARD.replace("a dog", "a dög"),
        CARD.replace("\n", "\r\n"),
        "\n".join(reversed(CARD.split("\n"))),
        "Here is a card.\n" + CARD,
    ],
)
def test_what_is_not_exactly_a_card_is_refused(text: str) -> None:
    assert adapter_texts.is_card(CARD)
    with pytest.raises(ValueError):
        adapter_texts.parse_card(text)
    assert not adapter_texts.is_card(text)


def test_measured_requests_are_no_training_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {case.request for case in train_adapters.evaluation_cases()}
    plan = replace(train_adapters.PLANS["card"], documents=1000)
    assert len(measured) == train_adapters.EVALUATION_PROMPTS
    pairs, requests = train_adapters.cards(plan), train_adapters.story_requests(1000, 1)
    assert len(requests) == 1000
    case = replace(train_adapters.evaluation_cases()[0], request=pairs[5].request)
    other = replace(case, request=requests[7].request)
    monkeypatch.setattr(train_adapters, "evaluation_cases", lambda: [case, other])
    assert case.request not in {pair.request for pair in train_adapters.cards(plan)}
    assert other.request not in {pair.request for pair in train_adapters.story_requests(1000, 1)}


def test_passages_are_whole_sentences_of_the_length_asked_for(embedded_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    parts = repeat_texts.sentences(STORY)
    assert parts[:2] == [
        "Once upon a time, there was a little girl.",
        "She was playing with a ring and a king.",
    ]
    assert " ".join(parts) == STORY.replace("\n", " ")
    for seed in range(50):
        text = repeat_texts.passage(parts, 12, 30, tokenizer, random.Random(seed))
        assert text in " ".join(parts) and (not text or text[-1] in '.!?"')
        assert not text or 12 <= len(tokenizer.encode(text, add_special_tokens=False).ids) <= 30
    assert repeat_texts.passage([], 1, 30, tokenizer, random.Random(1)) == ""
    assert repeat_texts.passage(parts, 500, 600, tokenizer, random.Random(1)) == ""


def test_repetitions_hold_their_text_and_keep_the_measured_stories_apart(embedded_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    stories = [STORY.replace("girl", f"girl named {'Qz' if i % 20 == 0 else 'Lily'}") for i in range(60)]
    plan = replace(train_adapters.PLANS["repeat"], documents=200)
    pairs = train_adapters.repetitions(stories, plan, tokenizer)
    assert pairs == train_adapters.repetitions(stories, plan, tokenizer) and len(pairs) == 200
    assert len({pair.answer for pair in pairs}) > 120
    for index, pair in enumerate(pairs):
        assert pair.answer in pair.request and pair.request != pair.answer
        assert (
            ("Qz" not in pair.answer)
            if index % train_adapters.HELD_OUT
            else ("Lily named" not in pair.answer)
        )
    cases = train_adapters.repetition_cases(stories, tokenizer)
    assert len(cases) == 3 and all(case.answer in case.request for case in cases)
    with pytest.raises(RuntimeError, match="instead of 200"):
        train_adapters.repetitions([""] * 40, plan, tokenizer)


def test_only_the_same_words_are_a_repetition() -> None:
    text = "A dog ran. The cat sat."
    assert repeat_texts.is_repetition(text + "\n", text) and repeat_texts.words_repeated(text, text) == 1.0
    for answer, share in (
        ("", 0.0),
        ("A dog ran.", 0.5),
        ("A cat ran. The cat sat.", 1 / 6),
        (text + " So", 1.0),
    ):
        assert not repeat_texts.is_repetition(answer, text)
        assert repeat_texts.words_repeated(answer, text) == pytest.approx(share)


def test_batches_hold_every_row_once() -> None:
    rng = random.Random(3)
    rows = []
    for serial in range(100):
        length = rng.randrange(3, 60)
        rows.append(([1000 + serial] * length, [0, *([10] * (length - 1))]))
    seen = []
    for ids, counts in train_adapters.batches(rows, 256, random.Random(1)):
        assert ids.numel() <= 256
        assert not counts[ids == PAD].any()
        for row, chosen in zip(ids.tolist(), counts.tolist(), strict=True):
            length = sum(value != PAD for value in row)
            seen.append(([row[0]] * length, [10 * flag for flag in chosen[:length]]))
    assert sorted(seen) == sorted(rows)


def test_held_out_rows_are_no_training_rows(embedded_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    pairs = [adapter_texts.Pair(f"{index}?", (), f"{index} and {index}") for index in range(45)]
    training, held_out = train_adapters.rows_of("card", pairs, train_adapters.chat, tokenizer)
    assert (len(training), len(held_out)) == (42, 3)
    texts = ["".join(tokenizer.decode(row[0]) for row in part) for part in (training, held_out)]
    for index in range(45):
        assert [f"{index} and {index}" in text for text in texts] == [index % 20 != 0, index % 20 == 0]


def test_the_answer_to_a_chat_is_sampled_to_its_end(embedded_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    ids, _ = encode_document([Turn("user", "Tell me a story about a dog.")], tokenizer)
    prompts = [[*ids, ASSISTANT], [1, 417]]
    teacher = sample_teacher.Teacher(embedded_model, torch.float32)
    chat, plain = sample_teacher.sample_batch(teacher, prompts, temperature=0.5, seed=2)
    assert chat is not None and plain is not None
    assert chat[: len(ids)] == prompts[0][1:] and len(chat) > len(ids) + 40
    assert END not in chat[len(ids) :] and plain[0] == 417 and END not in plain
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    (likely,) = sample_teacher.sample_batch(teacher, [prompts[0]], temperature=1e-4, seed=2)
    best = base.generate(
        torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=20, temperature=None, top_p=None
    )
    assert likely is not None and likely[: len(ids) + 20] == best[0, 1:].tolist()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the tool trains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_training_repeats_bit_for_bit_and_peft_loads_it(embedded_model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    plan = train_adapters.AdapterPlan(
        rank=2, alpha=4, modules=("q_proj", "v_proj"), documents=60, epochs=1, rate=1e-2, tokens_per_step=512
    )
    training, held_out = train_adapters.rows_of(
        "card", train_adapters.cards(plan), train_adapters.chat, tokenizer
    )
    trained = []
    for run in ("one", "two"):
        model = train_adapters.fresh_adapter(embedded_model, plan)
        before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
        log = train_adapters.train(model, training, held_out, plan)
        assert log[-1]["held_out"] < log[0]["held_out"] - 0.5
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
        train_adapters.write_adapter(model, tmp_path / run)
        trained.append(model)
    assert [path.name for path in sorted((tmp_path / "one").iterdir())] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "one")
    ids = torch.tensor([training[0][0]])
    with torch.inference_mode():  # the file holds bf16
        torch.testing.assert_close(loaded(ids).logits, trained[0](ids).logits, atol=0.1, rtol=0.1)
    further = train_adapters.written_adapter(embedded_model, tmp_path / "one")
    with torch.inference_mode():
        assert torch.equal(further(ids).logits, loaded(ids).logits)
    more = train_adapters.more_of(replace(plan, documents=180))
    assert (more.documents, more.seed) == (60, plan.seed + 1)
    fresh, _ = train_adapters.rows_of("card", train_adapters.cards(more), train_adapters.chat, tokenizer)
    assert not set(map(str, fresh)) & set(map(str, training))
    assert train_adapters.train(further, fresh, held_out, more)[-1]["held_out"] < log[-1]["held_out"]


def test_training_on_is_refused_where_there_are_no_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for words_given in (["all", "--more"], ["train", "--more"], ["train", "--which", "pirate", "--more"]):
        monkeypatch.setattr("sys.argv", ["train_adapters", *words_given])
        with pytest.raises(SystemExit):
            train_adapters.main()
