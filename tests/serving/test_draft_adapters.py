"""An adapter with one of its own for the draft model: guesses get better, and outputs are those without any draft."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tests.serving.helpers import BOS, EOS, VOCAB, write_tiny_model, write_tokenizer
from tests.serving.peft_adapters import write_adapter
from tokenloom import LLM, SamplingParams
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.kernels.native import extension
from tokenloom.serving.outputs import RequestOutput

PROMPTS = [[(11 * i + 7 * j) % 250 for j in range(14 + 13 * i)] for i in range(6)]
PARAMS = [
    SamplingParams(temperature=(0.0, 0.8)[i % 2], seed=i, max_tokens=24, logprobs=2, ignore_eos=True, n=1 + i % 3 // 2)
    for i in range(6)
]  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
FORMATS: dict[str, dict[str, Any]] = {
    "native": {"kernels": "native"},
    "bf16": {"kernels": "native", "dtype": "bfloat16"},
    "reference": {"kernels": "reference"},
}


def shallow(directory: Path) -> Path:
    """A draft with one layer."""
    config = {**TINY, "vocab_size": VOCAB, "num_hidden_layers": 1, "bos_token_id": BOS, "eos_token_id": EOS}
    return write_model(
        write_tokenizer(directory), config | {"max_position_embeddings": 256}, llama_tensors(config)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four that change much; three have one for the draft, of which two are theirs and one is another's."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {f"a{i}": write_adapter(folder / f"a{i}", i, rank=4 + 9 * i) for i in range(4)}
    for name, source in {"a0": "a0", "a1": "a1", "a2": "a0"}.items():
        add_draft(made[name], made[source])
    return made


def add_draft(adapter: Path, source: Path, name: str = "draft") -> Path:
    """Give `adapter` what lies in `source` for the draft model."""
    shutil.rmtree(adapter / name, ignore_errors=True)
    (adapter / name).mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(source / file, adapter / name / file)
    return adapter


def make_llm(model: Path, draft: Path | None, **options: Any) -> LLM:
    found = {
        "dtype": "float32",
        "threads": 1,
        "debug": True,
        "num_pages": 2048,
        "draft_pace": "fixed",
    } | options
    if draft is not None:
        found |= {"speculate": ("draft",), "draft_model": (str(draft),)}
    return LLM(str(model), **found)


def seen(outputs: list[RequestOutput]) -> list[Any]:
    return [[(sample.token_ids, sample.logprobs) for sample in output.outputs] for output in outputs]


def own(llm: LLM) -> Any:
    """The adapters of the draft of `llm`."""
    host = llm._parts.adapters
    assert host is not None
    found = host.companions["draft"]
    for source in llm._parts.engine.speculator.sources:
        proposer: Any = source.proposer
        proposer.check()
        assert proposer.stats.num_failures == 0
    found.check()  # type: ignore[attr-defined]
    return found


def hits(llm: LLM, adapter: str) -> float:
    """How often the first guess for requests with `adapter` came true."""
    content = llm._adapters.resolve(adapter)
    found = llm._parts.engine.speculator.stats.by_place["draft", content, 1]
    assert found.tested >= 5
    return found.accepted / found.tested


@pytest.mark.parametrize("form", FORMATS)
def test_outputs_are_those_without_a_draft_and_its_own_adapter_guesses_better(
    form: str, model: Path, adapters: Mapping[str, Path]
) -> None:
    """The target is its own draft: with the same adapter it is always right."""
    if form != "reference" and extension.missing():
        pytest.skip(str(extension.missing()))
    options = FORMATS[form]
    named = tuple(f"{name}={path}" for name, path in adapters.items())
    choices = ["a0", "a1", "a2", "a3", None, "a0"]
    with make_llm(model, None, adapter=named, **options) as plain:
        expected = seen(plain.generate(PROMPTS, PARAMS, adapter=choices, progress=False))
    with make_llm(model, model, adapter=named, draft_width=1, **options) as llm:
        assert seen(llm.generate(PROMPTS, PARAMS, adapter=choices, progress=False)) == expected
        assert own(llm).pool.stats.num_fetched == 2, "two contents"
        for adapter in adapters:
            llm.generate(PROMPTS, GREEDY, adapter=adapter, progress=False)
        assert hits(llm, "a0") > 0.98
        assert hits(llm, "a1") > 0.98
        assert hits(llm, "a2") < 0.5, "that of another one"
        assert hits(llm, "a3") < 0.5, "it has none"
    for more in (
        {"num_pages": 900, "max_batch_tokens": 40, "max_chunk_tokens": 9},
        {"max_adapter_mb": 1, "max_running": 3, "prefix_cache": False},
    ):
        with make_llm(model, model, adapter=named, **options, **more) as other:
            assert seen(other.generate(PROMPTS, PARAMS, adapter=choices, progress=False)) == expected
            own(other)


def test_its_kv_goes_with_the_adapter_that_made_it(
    model: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """The same adapter with another one for the draft, while a request runs."""
    mine = add_draft(write_adapter(tmp_path / "mine", 1, rank=13), adapters["a0"])
    with make_llm(model, None) as plain:
        expected = seen(plain.generate(PROMPTS[:1], GREEDY, adapter=mine, progress=False))
    with make_llm(model, model, draft_width=1) as llm:
        llm.load_adapter("mine", mine)
        content = llm._adapters.resolve("mine")
        engine, draft = llm._parts.engine, llm._parts.engine.speculator.sources[0].proposer
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine", progress=False)) == expected
        before = hits(llm, "mine")
        contents: list[set[str]] = []
        step = engine.step

        def replacing() -> Any:
            deltas = step()
            contents.append({state.adapter.content for state in draft._states.values()})  # type: ignore[attr-defined]
            if len(contents) == 12:
                llm._adapters.load("mine", add_draft(mine, mine))
                assert llm._adapters.resolve("mine") == content, "the very adapter"
            return deltas

        engine.step = replacing  # type: ignore[method-assign]
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine", progress=False)) == expected
        (old,), (new,) = contents[11], max(contents[12:], key=len)
        assert old != new == content, "the same files, the same content"
        assert len(own(llm).host._images) == 1, "the one before is gone"
        engine.step = step  # type: ignore[method-assign]
        engine.speculator.stats.by_place.clear()
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine", progress=False)) == expected
        assert hits(llm, "mine") > 0.98 > 0.5 > before
        images = llm._adapters._library.packer.directory / "images"  # type: ignore[union-attr]
        assert len(list(images.iterdir())) == 1, "one image is that of both"
        llm.unload_adapter("mine")
        assert not list(images.iterdir()) and not own(llm).host._images


def test_drafts_come_and_go_with_the_frames_of_their_target(
    model: Path, adapters: Mapping[str, Path]
) -> None:
    """Whoever wants a frame gets that of a draft's adapter, at any time."""
    choices = ["a0", "a1", "a2", "a0", "a1", "a2"]
    with make_llm(model, None) as plain:
        expected = seen(
            plain.generate(PROMPTS, PARAMS, adapter=[adapters[c] for c in choices], progress=False)
        )
    with make_llm(model, model) as llm:
        for name, path in adapters.items():
            llm.load_adapter(name, path)
        engine = llm._parts.engine
        step, taken = engine.step, []

        def taking() -> Any:
            mine = own(llm)
            if len(taken) % 9 == 0:
                while mine.evict_for_frame():
                    own(llm)
                assert mine.num_cold_frames == 0 and not mine.pool.resident
                mine._no_room.clear()
            taken.append(mine.pool.stats.num_fetched)
            return step()

        engine.step = taking  # type: ignore[method-assign]
        assert seen(llm.generate(PROMPTS, PARAMS, adapter=choices, progress=False)) == expected
        assert taken[-1] > 3


def test_what_does_not_fit_the_draft_is_refused_by_name(
    model: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    mine = write_adapter(tmp_path / "mine", 5)
    with make_llm(model, shallow(tmp_path / "draft")) as llm:
        llm.load_adapter("mine", mine)
        before = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine", progress=False))
        images = llm._adapters._library.packer.directory / "images"  # type: ignore[union-attr]
        count = len(list(images.iterdir()))
        for name in ("mine", "other"):
            with pytest.raises(
                ModelError, match=r"mine/draft.*layers\.1\..*does not fit|does not fit.*layers\.1\."
            ):
                llm.load_adapter(name, add_draft(mine, mine))
        (mine / "draft" / "adapter_config.json").unlink()
        with pytest.raises(ModelError, match=r"mine/draft"):
            llm.load_adapter("mine", mine)
        shutil.rmtree(mine / "draft")
        (mine / "draft").symlink_to(adapters["a0"])
        with pytest.raises(ModelError, match=r"mine/draft, which links out of"):
            llm.load_adapter("mine", mine)
        (mine / "draft").unlink()
        (mine / "draft").write_text("no directory")
        with pytest.raises(ModelError, match=r"mine/draft"):
            llm.load_adapter("mine", mine)
        assert llm.adapters() == ("mine",)
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine", progress=False)) == before
        assert len(list(images.iterdir())) == count
        assert not own(llm).host._images


def test_one_that_is_too_large_is_refused_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    mine = write_adapter(tmp_path / "mine", 5)
    large = write_adapter(tmp_path / "large", 6, rank=250, strength=0.01)
    with make_llm(model, model, max_adapter_mb=1) as llm:
        llm.load_adapter("mine", add_draft(mine, mine))
        content = dict(own(llm)._companions)
        add_draft(mine, large)
        for name in ("mine", "other"):
            with pytest.raises(InvalidParameter, match="the adapter of the draft model draft"):
                llm.load_adapter(name, mine)
        assert llm.adapters() == ("mine",)
        assert own(llm)._companions == content
        images = llm._adapters._library.packer.directory / "images"  # type: ignore[union-attr]
        assert len(list(images.iterdir())) == 1
        assert set(own(llm).host._images) == set(content.values())


def test_they_are_there_again_after_a_restart(
    model: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    data = str(tmp_path / "data")
    with make_llm(model, model, data_dir=data) as llm:
        llm.load_adapter("a", add_draft(write_adapter(tmp_path / "a", 3), adapters["a0"]))
        kept = dict(own(llm)._companions)
    with make_llm(model, None, data_dir=data) as plain:
        expected = seen(plain.generate(PROMPTS[:2], GREEDY, adapter="a", progress=False))
    with make_llm(model, shallow(tmp_path / "draft"), data_dir=data) as other:
        assert not own(other)._companions, "it does not fit this draft"
        assert seen(other.generate(PROMPTS[:2], GREEDY, adapter="a", progress=False)) == expected
    with make_llm(model, model, data_dir=data) as again:
        assert own(again)._companions == kept
        assert seen(again.generate(PROMPTS[:2], GREEDY, adapter="a", progress=False)) == expected
        assert own(again).pool.stats.num_fetched == 1


def test_each_draft_has_its_own(model: Path, adapters: Mapping[str, Path], tmp_path: Path) -> None:
    """Two drafts: `draft` and `draft2` are their directories."""
    mine = add_draft(write_adapter(tmp_path / "mine", 1, rank=13), adapters["a0"])
    one = write_adapter(tmp_path / "one", 9)
    drafts = {"speculate": ("draft",), "draft_model": (str(model), str(shallow(tmp_path / "second")))}
    add_draft(mine, one, "draft2")
    with (
        make_llm(model, None, **drafts) as llm,
        pytest.raises(ModelError, match=r"mine/draft2"),
    ):
        llm.load_adapter("mine", mine)
    drafts["draft_model"] = (str(shallow(tmp_path / "second")), str(model))
    shutil.rmtree(mine / "draft")
    shutil.rmtree(mine / "draft2")
    add_draft(mine, mine, "draft2")
    with make_llm(model, None) as plain:
        expected = seen(plain.generate(PROMPTS[:2], GREEDY, adapter=mine, progress=False))
    with make_llm(model, None, **drafts) as llm:
        assert seen(llm.generate(PROMPTS[:2], GREEDY, adapter=mine, progress=False)) == expected
        content = llm._adapters.resolve(mine)
        places = llm._parts.engine.speculator.stats.by_place
        first, second = (places[name, content, 1] for name in ("draft", "draft2"))
        assert second.accepted / second.tested > 0.98 > first.accepted / first.tested


def test_a_directory_of_that_name_is_nothing_without_a_draft(model: Path, tmp_path: Path) -> None:
    mine = write_adapter(tmp_path / "mine", 5)
    (mine / "draft").mkdir()
    (mine / "draft" / "notes.txt").write_text("no adapter")
    with make_llm(model, None) as llm:
        llm.load_adapter("mine", mine)
        assert np.array_equal(llm.adapters(), ["mine"])
