"""Tests of tools/train_embedded: pair building, packing, and a training run that resumes bit for bit."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training tool needs torch")
tokenizers = pytest.importorskip("tokenizers", reason="the training tool needs tokenizers")

from tools.train_embedded import corpus, data, loss, model, nouns, pairs, sample_teacher, train  # noqa: E402
from tools.train_embedded import tokenizer as pieces  # noqa: E402

EMBEDDED = Path(__file__).resolve().parents[2] / "tokenloom" / "embedded"
STORY = (
    "Once upon a time, there was a big dog named Spot. He had a red ball. One day, an apple fell on it.\n"
    "The dog saw the apple under a tree. Spot ate the apple and gave the ball to a girl. The dogs were happy."
)
POOL = ["owl", "boat", "umbrella", "spoon"]
NOUNS = ["dog", "ball", "apple", "tree", "girl", "owl", "boat"]
TINY = model.ModelConfig(hidden=16, layers=2, heads=2, kv_heads=1, ffn=32, vocab=300, context=64)


def _plan() -> train.TrainPlan:
    return train.TrainPlan(
        steps=8, tokens_per_step=64, micro_tokens=32, warmup=2, finish_share=0.5, long_share=0.25, seed=3
    )


def _rows(folder: Path) -> data.DataPlan:
    """Random rows on disk for the tiny model."""
    plan = data.DataPlan(seed=3, short_row=16, long_row=32)
    rng = random.Random(5)
    for name, length in (("main", 17), ("finish", 17), ("long", 33), ("polish", 17), ("held_out", 17)):
        rows = [([rng.randrange(300) for _ in range(length)], [10] * length) for _ in range(11)]
        data._save(folder, name, rows)
    return plan


def test_every_noun_of_the_request_is_marked_where_the_story_names_it_first() -> None:
    rates = pairs.PairRates(plain=0.0, system=0.0, two_turns=0.0, small_talk=0.0, unnamed=0.0)
    substituted = 0
    for seed in range(200):
        document = pairs.build_document(STORY, STORY, frozenset(NOUNS), POOL, rates, random.Random(seed))
        request, story = document
        assert (request.role, story.role) == ("user", "assistant")
        assert 1 <= len(story.marks) <= 3
        for start, end in story.marks:
            noun = story.text[start:end].lower()
            assert re.search(rf"\b{noun}\b", request.text.lower()), (request.text, noun)
            assert not re.search(rf"\b{noun}\b", story.text[:start].lower())
        substituted += story.text != STORY
    assert 20 < substituted < 100


def test_documents_depend_on_the_generator_alone() -> None:
    def build(seed: int) -> pairs.Document:
        return pairs.build_document(
            STORY, STORY, frozenset(NOUNS), NOUNS, pairs.PairRates(), random.Random(seed)
        )

    assert [build(seed) for seed in range(30)] == [build(seed) for seed in range(30)]
    assert len({str(build(seed)) for seed in range(30)}) > 15


def test_substitution_is_consistent_and_repairs_articles() -> None:
    changed = nouns.substitute(STORY, "apple", "boat")
    assert "apple" not in changed
    assert "a boat fell on it" in changed
    assert "Once upon a time, there was a big owl" in nouns.substitute(STORY, "dog", "owl")
    assert nouns.substitute("A tree. The trees.", "tree", "owl") == "An owl. The owls."
    assert nouns.substitute("A treehouse", "tree", "owl") == "A treehouse"


def test_mined_nouns_leave_out_adjectives_verbs_and_plurals() -> None:
    text = [
        "A dog had the big tree. The dog was here and a tree. The trees were tall. A play. I like to play!"
    ] * 10
    assert set(nouns.mine_nouns(text)) == {"dog", "tree"}


def test_packing_starts_documents_in_their_row_and_loses_no_short_one() -> None:
    rng = random.Random(1)
    rows = [([1000 + index] * rng.randrange(5, 40), [10] * 40) for index in range(300)]
    rows = [(ids, weights[: len(ids)]) for ids, weights in rows]
    packed = list(data.pack(rows, 64))
    assert all(len(ids) == len(weights) == 64 for ids, weights in packed)
    assert {value for ids, _ in packed for value in ids} == {ids[0] for ids, _ in rows} | {pieces.PAD}
    assert all(
        weight == 0
        for ids, weights in packed
        for i, weight in zip(ids, weights, strict=True)
        if i == pieces.PAD
    )
    assert sum(i == pieces.PAD for ids, _ in packed for i in ids) < 0.1 * 64 * len(packed)


def test_batches_are_a_function_of_the_step(tmp_path: Path) -> None:
    plan = _rows(tmp_path)
    first, second = (train.Batches(tmp_path, _plan(), plan) for _ in range(2))
    for step in (7, 0, 3):
        for one, two in zip(first.step(step), second.step(step), strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert first.step(0)[0][0].shape == (2, 17)
    assert first.step(7)[0][0].shape == (1, 33)
    assert first.step(_plan().steps)[0][0].shape == (2, 17)
    assert not torch.equal(first.step(0)[0][0], first.step(1)[0][0])


@pytest.mark.skipif(not (EMBEDDED / "target" / "tokenizer.json").is_file(), reason="no embedded models yet")
def test_rows_are_built_alike_every_time(tmp_path: Path) -> None:
    shipped = tokenizers.Tokenizer.from_file(str(EMBEDDED / "target" / "tokenizer.json"))
    stories = [STORY.replace("red", word) for word in ("blue", "old", "green", "big", "new", "round")]
    plan = data.DataPlan(short_row=160, long_row=320)
    for name in ("one", "two"):
        facts = data.build(stories, stories[:4], stories[4:], NOUNS, shipped, plan, tmp_path / name)
        assert facts["documents"] == 5 * 6 + 4 * 4
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    ids, weights = data.Rows(tmp_path / "one", "main").batch(0, 8)
    assert ids.shape == (8, 161) and set(weights.flatten().tolist()) <= {0, 10, 40}
    assert (ids[weights == data.WEIGHT_MARK] > len(pieces.SPECIALS)).all()


def test_resumed_training_gives_identical_weights(tmp_path: Path) -> None:
    plan = _rows(tmp_path)
    batches = train.Batches(tmp_path, _plan(), plan)

    def advance(trainer: train.Trainer, until: int) -> train.Trainer:
        while trainer.step < until:
            trainer.train_step(batches.step(trainer.step))
        return trainer

    straight = advance(train.Trainer(TINY, _plan()), 8)
    advance(train.Trainer(TINY, _plan()), 5).save(tmp_path / "checkpoint.pt")
    resumed = train.Trainer(TINY, replace(_plan(), seed=99))
    resumed.load(tmp_path / "checkpoint.pt")
    advance(resumed, 8)
    for name, tensor in straight.master.state_dict().items():
        assert torch.equal(tensor, resumed.master.state_dict()[name]), name
    assert not torch.equal(straight.master.embed, train.Trainer(TINY, _plan()).master.embed)


def test_losses_equal_autograd() -> None:
    torch.manual_seed(0)
    count = 2 * loss.CHUNK + 7
    hidden, embed = torch.randn(count, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    taught, table = torch.randn(count, 4), torch.randn(11, 4)
    targets, weights = torch.randint(0, 11, (count,)), torch.rand(count)
    log_p = torch.log_softmax(hidden @ embed.t(), -1)
    plain = (torch.nn.functional.nll_loss(log_p, targets, reduction="none") * weights).sum()
    share = torch.log_softmax(taught @ table.t(), -1)
    taught_loss = ((share.exp() * (share - log_p)).sum(-1) * weights).sum()
    for expected, actual in (
        (plain, loss.TiedCrossEntropy.apply(hidden, embed, targets, weights)),
        (taught_loss, loss.TiedDistillation.apply(hidden, embed, taught, table, weights)),
    ):
        torch.testing.assert_close(actual, expected)
        want = torch.autograd.grad(expected, (hidden, embed), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(actual, (hidden, embed)), want)


def test_export_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    ours = model.Llama(TINY, seed=1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_((parameter * (6 if parameter.ndim == 2 else 1)).to(torch.bfloat16))
    model.write_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_models_have_the_required_sizes() -> None:
    assert 4_000_000 <= model.parameter_count(model.TARGET) <= 6_000_000
    assert model.parameter_count(model.DRAFT) <= 500_000


def test_held_out_stories_are_apart(shared_data: Path) -> None:
    training, held_out = corpus.load_stories(shared_data)
    assert len(training) > 4000 and len(held_out) >= 60
    assert not {story[:80] for story in training} & {story[:80] for story in held_out}
    assert len(nouns.noun_list(training)) >= 600


def test_teacher_continues_greedily_as_documented_for_it(shared_data: Path) -> None:
    teacher = sample_teacher.Teacher(shared_data / "models" / "hf" / "stories3M", torch.float32)
    prompt, answer = [1, 403, 407, 261, 378], [4016, 383, 286, 261, 376, 445, 395, 317, 4010, 338, 435, 267]
    cache, ids = teacher.cache(2), list(prompt)
    with torch.inference_mode():
        for position in range(len(prompt) + len(answer) - 1):
            logits = teacher.step(torch.tensor([ids[position]] * 2), cache, position)
            if position + 1 == len(ids):
                ids.append(int(logits[0].argmax()))
    assert ids[len(prompt) :] == answer
    stories = sample_teacher.sample_batch(teacher, [prompt, [1], prompt], temperature=0.01, seed=1)
    assert all(story is None or story[: len(answer) + 4] == (prompt + answer)[1:] for story in stories[::2])


@pytest.mark.skipif(not (EMBEDDED / "target" / "tokenizer.json").is_file(), reason="no embedded models yet")
def test_shipped_tokenizer_is_lossless_and_renders_chats() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    shipped = transformers.AutoTokenizer.from_pretrained(EMBEDDED / "target")
    for text in ("A dog, a red ball!\n\n  two", "Grüße, 你好 🐶 \u200b\x00", "tabs\t and   blanks  "):
        ids = shipped(text)["input_ids"]
        assert ids[0] == pieces.BOS and ids.count(pieces.BOS) == 1
        assert shipped.decode(ids[1:]) == text
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello! "}]
    text = shipped.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be kind.<|end|><|user|>Hello!<|end|><|assistant|>"
    ids = shipped(text, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i < len(pieces.SPECIALS)] == [1, 3, 2, 4, 2, 5]


@pytest.mark.skipif(not (EMBEDDED / "draft" / "model.safetensors").is_file(), reason="no embedded models yet")
def test_shipped_models_are_small_and_share_the_tokenizer() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    target, draft = EMBEDDED / "target", EMBEDDED / "draft"
    assert (target / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()
    for folder, config in ((target, model.TARGET), (draft, model.DRAFT)):
        assert json.loads((folder / "config.json").read_text()) == model.hf_config(config)


def test_the_rate_falls_to_zero_twice() -> None:
    plan = replace(_plan(), polish_steps=4, polish_rate=0.5)
    assert plan.rate(plan.steps - 1) <= plan.rate(plan.steps - 2)
    assert plan.rate(plan.steps) == 0.5 and plan.rate(plan.total - 1) == 0.125
