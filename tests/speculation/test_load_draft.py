"""From a directory to a proposer: the embedded pair, and drafts that do not fit their target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.harness import make_executor, small_config
from tests.speculation.test_draft_model import ask, sequence
from tokenloom.embedded import DRAFT
from tokenloom.engine.frames import FramePool
from tokenloom.errors import InvalidParameter, ModelError, OutOfMemory, UnsupportedFeature
from tokenloom.kernels.backend import Choice, choose_kernels
from tokenloom.kernels.native import extension
from tokenloom.models.loading import load_model
from tokenloom.speculation.load_draft import SharedFrames, check_vocabularies, load_draft, plan_draft
from tokenloom.text.tokenizer import Tokenizer

REFERENCE = Choice("reference", "", "a test")
TEXT = "Once upon a time, there was a little"


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_the_embedded_draft_goes_on_as_transformers_does(kernels: str, embedded_model: Path) -> None:
    """A greedy chain is the greedy text of the model, whatever computes it."""
    if kernels == "native" and extension.missing():
        pytest.skip(str(extension.missing()))
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plan = plan_draft(DRAFT, embedded_model, choose_kernels(kernels), dtype="float32", num_pages=64)
    model = load_draft(plan, target_vocab_size=4096, debug=True)
    tokens = Tokenizer.from_dir(embedded_model).encode(TEXT)
    found = ask(model, sequence(tokens), depth=8, width=1)[0].tokens
    reference = transformers.AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([tokens + found])).logits[0, len(tokens) - 1 : -1]
    best = logits.topk(2)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-4
    assert best.indices[:, 0].tolist() == found
    model.close()


def test_the_plan_says_what_it_takes(embedded_model: Path) -> None:
    plan = plan_draft(DRAFT, embedded_model, REFERENCE, max_context=256, num_pages=40)
    assert plan.described.config.max_context == 256
    assert plan.memory.num_pages == 40
    model = load_draft(plan, target_vocab_size=4096)
    assert model.max_context == 256
    assert model.cache.pages.max_pages == 40
    # A pool that is shorter than the context bounds it.
    small = load_draft(plan_draft(DRAFT, embedded_model, REFERENCE, num_pages=4), target_vocab_size=4096)
    assert small.max_context == 64


def test_what_a_draft_cannot_have_is_refused_by_name(embedded_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="dtype"):
        plan_draft(DRAFT, embedded_model, REFERENCE, dtype="float64")
    with pytest.raises(OutOfMemory, match="num_pages"):
        plan_draft(DRAFT, embedded_model, REFERENCE, num_pages=1 << 30)
    with pytest.raises(ModelError, match=str(tmp_path)):
        plan_draft(tmp_path, embedded_model, REFERENCE)
    if not extension.missing():
        with pytest.raises(UnsupportedFeature, match="float16"):
            choose_kernels("native", dtype="float16")


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_two_drafts_in_the_frames_of_one(kernels: str, embedded_model: Path) -> None:
    """What is proposed does not depend on whose memory it is, nor on what was in it."""
    if kernels == "native" and extension.missing():
        pytest.skip(str(extension.missing()))
    ops = choose_kernels(kernels)
    target = load_draft(
        plan_draft(embedded_model, embedded_model, ops, num_pages=200), target_vocab_size=4096
    )
    frames = SharedFrames(target._executor, target.cache.pages.pool)
    alone = load_draft(plan_draft(DRAFT, embedded_model, ops, num_pages=60), target_vocab_size=4096)
    plan = plan_draft(DRAFT, embedded_model, ops, num_pages=60, frames=frames)
    assert plan.memory.num_pages == 1
    assert plan.pages_per_frame == target._executor.frames[2] // plan.memory.page_bytes
    shared = load_draft(plan, target_vocab_size=4096, debug=True)
    assert shared.cache.pages.max_pages == 60
    tokens = Tokenizer.from_dir(embedded_model).encode(TEXT * 6)
    text, other = sequence(tokens, temperature=0.8), sequence(tokens[5:])
    expected = ask(alone, text, depth=5, width=3), ask(target, other, depth=2, width=2)
    for _ in range(2):
        # The target gives all its frames back, and the draft gets them as they are.
        target.forget(other)
        while target.evict_for_frame():
            pass
        assert ask(shared, text, depth=5, width=3) == expected[0]
        while shared.evict_for_frame():
            pass
        assert ask(target, other, depth=2, width=2) == expected[1]
    for model in (target, alone, shared):
        model.close()


def test_a_page_must_fit_a_frame(embedded_model: Path) -> None:
    target = make_executor(small_config(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8))
    frames = SharedFrames(target, FramePool(32))
    with pytest.raises(ModelError, match="a page of K and V"):
        plan_draft(DRAFT, embedded_model, REFERENCE, frames=frames)


def changed(tmp_path: Path, change: dict[str, int]) -> Path:
    """The embedded draft with other ids for some tokens (None as the id: without it)."""
    directory = tmp_path / "draft"
    shutil.copytree(DRAFT, directory)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"].update(change)
    path.write_text(json.dumps(data))
    return directory


def test_other_vocabularies_are_refused_by_the_token(embedded_model: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer.from_dir(embedded_model).vocabulary
    spelling = {token_id: token for token, token_id in vocabulary.items()}
    one, two = spelling[1000], spelling[2000]
    directory = changed(tmp_path, {one: 2000, two: 1000})
    with pytest.raises(ModelError) as refused:
        check_vocabularies(embedded_model, directory)
    assert "token 1000 is " in refused.value.found
    assert repr(two) in refused.value.found
    assert repr(one) in refused.value.found
    assert refused.value.supported == "a draft with the tokenizer of its target"
    with pytest.raises(ModelError, match="another vocabulary"):
        plan_draft(directory, embedded_model, REFERENCE)


def test_more_tokens_do_no_harm(embedded_model: Path, tmp_path: Path) -> None:
    directory = changed(tmp_path, {"an extra token": 4096})
    check_vocabularies(embedded_model, directory)
    check_vocabularies(directory, embedded_model)


def test_tokenizers_of_other_families_are_refused(embedded_model: Path, shared_data: Path) -> None:
    stories = shared_data / "models" / "hf" / "stories3M"
    if not stories.is_dir():
        pytest.skip("no stories3M among the test data")
    with pytest.raises(ModelError, match="another vocabulary"):
        check_vocabularies(embedded_model, stories)
    with pytest.raises(ModelError, match="another vocabulary"):
        check_vocabularies(stories, DRAFT)


def test_rounded_weights_are_those_of_the_format(embedded_model: Path) -> None:
    """A draft in int8 is another model: its first candidates may differ, its identity does."""
    plain = load_draft(plan_draft(DRAFT, embedded_model, REFERENCE, num_pages=8), target_vocab_size=4096)
    rounded = load_draft(
        plan_draft(DRAFT, embedded_model, REFERENCE, weights="int8", num_pages=8), target_vocab_size=4096
    )
    tokens = Tokenizer.from_dir(embedded_model).encode(TEXT)
    ours, theirs = (ask(model, sequence(tokens), depth=1, width=8)[0] for model in (plain, rounded))
    assert not np.array_equal(ours.confidences, theirs.confidences)
    assert ours.confidences == pytest.approx(theirs.confidences, abs=0.1)
    assert load_model(DRAFT, weights="int8").identity in rounded._identity
    assert plain._identity != rounded._identity
