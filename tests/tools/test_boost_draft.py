"""Tests of tools/boost_draft: ranks and trees against slow oracles, and a second draft that adds to the first."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training tool needs torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

from tokenizers import Tokenizer  # noqa: E402

from tools import boost_draft, draft_coverage  # noqa: E402
from tools.train_embedded.data import WEIGHT_ONE  # noqa: E402
from tools.train_embedded.model import read_hf  # noqa: E402
from tools.train_embedded.tokenizer import ASSISTANT, BOS, END  # noqa: E402

PLAN = replace(boost_draft.QUICK, seed=77)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the tool trains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[boost_draft.Text]:
    """Texts of the target that no training has seen: 16 of each kind."""
    work = tmp_path_factory.mktemp("texts")
    boost_draft.write_texts(embedded_model, work, "held-out", 32, PLAN)
    return boost_draft.read_texts(work, "held-out")


def _walk(ranks: list[int], position: int, depth: int, width: int) -> int:
    """How far a tree of explicit paths, each a list of ranks, follows the text."""
    paths = [[first] + [0] * (depth - 1) for first in range(width)]
    best = 0
    for path in paths:
        count = 0
        while count < depth and position + count < len(ranks) and ranks[position + count] == path[count]:
            count += 1
        best = max(best, count)
    return best


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (4, 1), (4, 2), (3, 5), (9, 1)])
def test_accepted_tokens_are_those_of_a_walk(depth: int, width: int) -> None:
    rng = random.Random(depth * 10 + width)
    for length in (1, 2, 5, 40):
        ranks = [rng.choice((0, 0, 0, 1, 2, 7)) for _ in range(length)]
        found = draft_coverage.accepted(np.array(ranks, dtype=np.int32), depth, width)
        assert found.tolist() == [_walk(ranks, t, depth, width) for t in range(length)]


def test_steps_take_the_longest_path_and_one_token_more() -> None:
    one = [np.array([2, 0, 0, 0, 0, 1])]
    other = [np.array([0, 0, 0, 1, 0, 0])]
    assert draft_coverage.tokens_per_step([one]) == 6 / 4  # steps before tokens 0, 3, 4 and 5
    assert draft_coverage.tokens_per_step([one, other]) == 6 / 3  # 0, 3 and 5
    assert draft_coverage.tokens_per_step([[np.zeros(5, dtype=np.int64)]]) == 1.0


def test_an_ensemble_covers_what_any_of_its_drafts_covers() -> None:
    first, second = [np.array([0, 3, 5])], [np.array([2, 0, 9])]
    both = draft_coverage.union(first, second)
    assert [draft_coverage.coverage(both, k) for k in (1, 3, 6)] == [2 / 3, 2 / 3, 1.0]
    assert draft_coverage.coverage(first, 1) == draft_coverage.coverage(second, 1) == 1 / 3


def test_texts_are_what_the_target_says(embedded_model: Path, texts: list[boost_draft.Text]) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    assert len(texts) == 32 and {text.greedy for text in texts} == {True, False}
    assert len({str(text.prompt) for text in texts}) > 24
    for text in texts:
        assert text.prompt[0] == BOS and text.text[-1] == END and END not in text.text[:-1]
        assert (ASSISTANT in text.prompt) == (text.prompt[-1] == ASSISTANT)
    chat = next(text for text in texts if text.greedy and text.prompt[-1] == ASSISTANT)
    said = base.generate(
        torch.tensor([chat.prompt]), do_sample=False, max_new_tokens=20, temperature=None, top_p=None
    )
    assert said[0, len(chat.prompt) :].tolist() == chat.text[:20], tokenizer.decode(chat.text)
    sampled = [text for text in texts if not text.greedy]
    with torch.inference_mode():
        ids = torch.tensor([sampled[0].prompt + sampled[0].text])
        best = base(ids).logits[0].argmax(-1)[len(sampled[0].prompt) - 1 : -1]
    assert best.tolist() != sampled[0].text


def test_texts_of_another_run_are_refused(embedded_model: Path, tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_text(json.dumps({"prompt": [1], "text": [2], "greedy": True}) + "\n")
    with pytest.raises(ValueError, match="holds 1 texts of another run"):
        boost_draft.write_texts(embedded_model, tmp_path, "training", 24, PLAN)


def test_texts_of_the_training_are_not_measured(tmp_path: Path) -> None:
    texts = [
        {"prompt": [1, prompt], "text": [text, 2], "greedy": True}
        for prompt, text in ((5, 6), (5, 7), (8, 6))
    ]
    (tmp_path / "training.jsonl").write_text(json.dumps(texts[0]) + "\n")
    texts.append({"prompt": [1, 9], "text": [7, 2], "greedy": False})
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    assert boost_draft.unseen_texts(tmp_path) == [boost_draft.Text([1, 9], [7, 2], False)]


def test_ranks_are_those_of_transformers(embedded_model: Path, texts: list[boost_draft.Text]) -> None:
    folder = embedded_model.parent / "draft"
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = boost_draft.ranks_of(read_hf(folder), texts)
    same = total = 0
    for text, ranks in zip(texts[:6], found[:6], strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([text.prompt + text.text])).logits[0, len(text.prompt) - 1 : -1]
        order = torch.sort(logits, descending=True, stable=True).indices
        wanted = (order == torch.tensor(text.text)[:, None]).nonzero()[:, 1].tolist()
        same += sum(a == b for a, b in zip(ranks.tolist(), wanted, strict=True))
        total += len(wanted)
    assert same >= 0.99 * total  # near ties may fall the other way


def test_what_the_first_draft_foresees_counts_less() -> None:
    one, other = (boost_draft.Text([1, 9], text, True) for text in ([5, 6, 7, 2], [8, 2]))
    ranks = [np.array([0, 4, 1, 0], dtype=np.int32), np.array([0, 0], dtype=np.int32)]
    rows = boost_draft.missed_rows([one, other], ranks, 0.3)
    assert rows == [([1, 9, 5, 6, 7, 2], [0, 0, 3, WEIGHT_ONE, WEIGHT_ONE, 3])]
    with pytest.raises(RuntimeError, match="misses nothing"):
        boost_draft.missed_rows([other], ranks[1:], 0.3)


def test_the_first_draft_learns_the_distribution_of_the_target(
    embedded_model: Path, texts: list[boost_draft.Text]
) -> None:
    rows = boost_draft.rows_of(texts[:4] + texts[-4:])
    soft = boost_draft.soft_targets(read_hf(embedded_model), rows)
    draft = read_hf(embedded_model.parent / "draft")
    oracles = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (embedded_model, embedded_model.parent / "draft")
    ]
    total, count = 0.0, 0
    for (ids, weights), states in zip(rows, soft.states, strict=True):
        said = weights.index(WEIGHT_ONE) - 1
        with torch.inference_mode():
            wanted, guessed = (
                torch.log_softmax(oracle(torch.tensor([ids])).logits[0, said:-1], -1) for oracle in oracles
            )
        found = torch.log_softmax((states @ soft.embed.t()).float(), -1)
        assert found.shape == wanted.shape
        assert (found.exp() - wanted.exp()).abs().sum(-1).mean() < 0.05  # bf16
        total += float(torch.nn.functional.kl_div(guessed, wanted, reduction="sum", log_target=True))
        count += len(wanted)
    whole = replace(PLAN, tokens_per_step=len(rows) * max(len(ids) for ids, _ in rows))
    assert boost_draft.train(draft, rows, 1, 0.0, whole, soft) == [pytest.approx(total / count, rel=0.03)]
    losses = boost_draft.train(draft, rows, 12, 0.01, whole, soft)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("given", [True, False])
def test_the_quick_mode_runs_every_stage_and_repeats(
    given: bool, embedded_model: Path, tmp_path: Path
) -> None:
    first = ["--draft", str(embedded_model.parent / "draft")] if given else []
    for run in ("one", "two"):
        folder = tmp_path / run
        boost_draft.main(
            ["all", "--quick", *first, "--out", str(folder / "out"), "--work", str(folder / "work")]
        )
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes(), path.name
    report = json.loads((tmp_path / "one" / "work" / "evaluation.json").read_text())
    for facts in report.values():
        assert facts["both top-1"] >= max(facts["first top-1"], facts["second top-1"])
        assert facts["first top-1"] <= facts["first top-2"] <= facts["first top-3"]
        assert 1.0 <= facts["steps: chain of first"] <= facts["steps: chain of each"]
    for name in ("draft", "first.json"):
        assert (tmp_path / "one" / "work" / name).exists() != given
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "out")


def test_the_target_of_another_kind_is_refused_by_name(embedded_model: Path, tmp_path: Path) -> None:
    config = json.loads((embedded_model / "config.json").read_text())
    for name, value in (("model_type", "gpt2"), ("tie_word_embeddings", False), ("eos_token_id", 7)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=name):
            boost_draft.main(["all", "--quick", "--target", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="another tokenizer"):
        boost_draft.main(["all", "--draft", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="hit-weight"):
        boost_draft.main(["all", "--out", str(tmp_path / "out"), "--hit-weight", "1.5"])
    for option, value in (("texts", "1"), ("epochs", "0")):
        with pytest.raises(ValueError, match=f"{option} is {value}"):
            boost_draft.main(["all", "--out", str(tmp_path / "out"), f"--{option}", value])
    shutil.copyfile(embedded_model / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"factor": 2.0}}))
    with pytest.raises(ValueError, match="rope_scaling"):
        boost_draft.main(["all", "--target", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    for name, value in (("hidden_act", "gelu"), ("rope_scaling", {"factor": 2.0}), ("attention_bias", True)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=name):
            read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="hidden_size"):
        read_hf(tmp_path)


@pytest.mark.skipif(
    not (boost_draft.ROOT / "tokenloom" / "embedded" / "draft2").is_dir(), reason="no second embedded draft"
)
def test_the_second_embedded_draft_adds_to_the_first(
    embedded_model: Path, texts: list[boost_draft.Text]
) -> None:
    drafts = [
        boost_draft.ranks_of(read_hf(embedded_model.parent / name), texts) for name in ("draft", "draft2")
    ]
    facts = boost_draft.measure(texts, *drafts)
    for k in (1, 3):
        assert facts[f"both top-{k}"] > max(facts[f"first top-{k}"], facts[f"second top-{k}"]) + 0.01
