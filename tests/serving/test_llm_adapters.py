"""Adapters from the Python face down to the kernels: peft is the oracle, and nobody else's output changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.helpers import write_tiny_model
from tests.serving.peft_adapters import agreement_with_peft, their_logits, write_adapter
from tokenloom import LLM, SamplingParams
from tokenloom.errors import InvalidParameter, ModelError, TokenloomError
from tokenloom.kernels.adapter_image import AdapterImage
from tokenloom.serving.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)
PROMPTS = [[1 + i, 70, 9, 200 - i, 33, 33, 5] for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"a{i}": write_adapter(folder / f"a{i}", i, rank=1 + 30 * i, strength=0.3 / (1 + i)) for i in range(4)
    }


def make_llm(model: Path, **options: Any) -> LLM:
    return LLM(str(model), **({"dtype": "float32", "threads": 1, "debug": True, "num_pages": 2048} | options))


@pytest.fixture(scope="module", params=["native", "reference"])
def llm(request: pytest.FixtureRequest, model: Path, adapters: dict[str, Path]) -> Iterator[LLM]:
    with make_llm(model, kernels=request.param) as made:
        for name, directory in adapters.items():
            made.load_adapter(name, directory)
        yield made


def seen(outputs: list[RequestOutput]) -> list[Any]:
    """Everything that must be equal."""
    return [
        [(sample.token_ids, sample.logprobs, sample.text, sample.finish_reason) for sample in output.outputs]
        for output in outputs
    ]


def agree_with_peft(model: Path, adapter: Path | None, output: RequestOutput) -> int:
    """As `agreement_with_peft`, and the logprobs too."""
    sample, prompt = output.outputs[0], output.prompt_token_ids
    assert prompt is not None
    assert sample.logprobs is not None
    logits = their_logits(model, adapter, [*prompt, *sample.token_ids]).astype(np.float64)
    for row, found in zip(logits[len(prompt) - 1 :], sample.logprobs, strict=False):
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for token, entry in found.items():
            assert abs(entry.logprob - logprobs[token]) < 2e-5
    return agreement_with_peft(model, adapter, prompt, sample.token_ids)


def test_outputs_are_those_of_peft(llm: LLM, model: Path, adapters: dict[str, Path]) -> None:
    names = [None, *adapters, None]
    outputs = llm.generate(PROMPTS, GREEDY, adapter=names)
    checked = sum(
        agree_with_peft(model, adapters[name] if name else None, output)
        for name, output in zip(names, outputs, strict=True)
    )
    assert checked > 60
    assert len({str(sample.token_ids) for output in outputs for sample in output.outputs}) == len(PROMPTS)


def test_base_rows_do_not_know_of_adapters(llm: LLM, model: Path, adapters: dict[str, Path]) -> None:
    """They are bit for bit those of an engine that never saw one."""
    with make_llm(model, kernels=llm.config.runtime.kernels) as plain:
        expected = seen(plain.generate(PROMPTS, GREEDY))
    outputs = llm.generate(
        [*PROMPTS, *PROMPTS], GREEDY, adapter=[None] * 6 + ["a1", "a2", "a3", "a0", "a1", "a2"]
    )
    assert seen(outputs[:6]) == expected


FORMATS: list[dict[str, Any]] = [
    {"kernels": "native"},
    {"kernels": "native", "dtype": "bfloat16"},
    {"kernels": "native", "dtype": "bfloat16", "weights": "int8"},
    {"kernels": "native", "dtype": "bfloat16", "weights": "int4"},
    {"kernels": "native", "kv_dtype": "bfloat16"},
    {"kernels": "reference"},
]
SAMPLED = [
    SamplingParams(
        temperature=i % 3 / 2,
        seed=i,
        max_tokens=8 + i,
        logprobs=2,
        n=1 + i % 3,
        prompt_logprobs=1 if i == 4 else None,
    )
    for i in range(12)
]
LONG = [[(7 * i + j) % 250 for j in range(20 + 9 * (i % 4))] for i in range(12)]
CHOICES = [(None, "a0", "a1", "a2", "a3")[i % 5] for i in range(12)]


@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: "-".join(formats.values()))
def test_company_chunks_and_schedules_change_nothing(
    formats: dict[str, Any], model: Path, adapters: dict[str, Path]
) -> None:
    """Each alone; all together; in chunks; without the prefix cache; few at once; with adapters that come and go."""
    named = tuple(f"{name}={path}" for name, path in adapters.items())
    with make_llm(model, adapter=named, **formats) as llm:
        alone = [
            seen(llm.generate([prompt], params, adapter=choice))[0]
            for prompt, params, choice in zip(LONG, SAMPLED, CHOICES, strict=True)
        ]
        assert seen(llm.generate(LONG, SAMPLED, adapter=CHOICES)) == alone
        assert seen(llm.generate(LONG, SAMPLED, adapter=CHOICES)) == alone, (
            "the second time from the prefix cache"
        )
    for options in (
        {"max_chunk_tokens": 5, "prefix_cache": False},
        {"max_batch_tokens": 16, "max_running": 3, "admission": "reserve"},
        {"max_adapter_mb": 1, "max_running": 5},
    ):
        with make_llm(model, adapter=named, **formats, **options) as other:
            assert seen(other.generate(LONG, SAMPLED, adapter=CHOICES)) == alone
            if "max_adapter_mb" in options and formats.get("dtype") != "bfloat16":
                assert other._parts.engine.adapters.stats.num_evicted > 0


def test_a_directory_is_an_adapter(llm: LLM, model: Path, tmp_path: Path, adapters: dict[str, Path]) -> None:
    expected = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="a1"))
    for given in (adapters["a1"], str(adapters["a1"])):
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter=given)) == expected
    mine = write_adapter(tmp_path / "mine", 2, rank=61, strength=0.3 / 3)
    assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter=mine)) == seen(
        llm.generate(PROMPTS[:1], GREEDY, adapter="a2")
    )
    write_adapter(mine, 1, rank=31, strength=0.3 / 2)
    assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter=mine)) == expected, "its files have changed"


def test_names_are_loaded_replaced_and_unloaded(model: Path, adapters: dict[str, Path]) -> None:
    with make_llm(model) as llm:
        assert llm.adapters() == ()
        llm.load_adapter("mine", adapters["a1"])
        one = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine"))
        llm.load_adapter("mine", adapters["a2"])
        two = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine"))
        assert one != two
        host = llm._parts.adapters
        assert host is not None
        assert len(host._images) == 1, "the replaced one is gone"
        llm.load_adapter("again", adapters["a2"])
        llm.unload_adapter("mine")
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="again")) == two
        assert llm.adapters() == ("again",)
        bad: list[Any] = ["mine", "nowhere", 5, ["again", "again"], [b"x"]]
        for given in bad:
            with pytest.raises(InvalidParameter, match="adapter"):
                llm.generate(PROMPTS[:1], GREEDY, adapter=given)
        for name in ("mine", "a:b", "../x", ""):
            with pytest.raises(InvalidParameter, match="adapter"):
                llm.load_adapter(name, "/nowhere") if name != "mine" else llm.unload_adapter(name)
        with pytest.raises(ModelError, match="no directory"):
            llm.load_adapter("again", "/nowhere")
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="again")) == two
        library = llm._adapters._library
        assert library is not None
        folder = library.packer.directory
        assert folder.is_dir()
    assert not folder.exists(), "the temporary data directory goes with the LLM"
    with pytest.raises(TokenloomError, match="closed"):
        llm.load_adapter("x", adapters["a1"])


def test_chat_with_an_adapter(llm: LLM) -> None:
    messages = [{"role": "user", "content": "ab"}]
    base, adapted = (llm.chat(messages, GREEDY, adapter=name) for name in (None, "a3"))
    assert seen(base) != seen(adapted)
    assert seen(adapted) == seen(llm.generate([base[0].prompt_token_ids or []], GREEDY, adapter="a3"))


def test_more_requests_than_may_wait(model: Path, adapters: dict[str, Path]) -> None:
    """Those that wait for their adapters count too."""
    named = tuple(f"{name}={path}" for name, path in adapters.items())
    with make_llm(model, adapter=named, max_running=2, max_waiting=2) as llm:
        outputs = llm.generate([PROMPTS[0]] * 40, GREEDY, adapter=[f"a{i % 4}" for i in range(40)])
        assert len({str(seen([output])) for output in outputs}) == 4


def test_images_are_kept_and_verified(model: Path, tmp_path: Path, adapters: dict[str, Path]) -> None:
    """A second start takes the image of the first, unless it is damaged or made for other arithmetic."""
    options = {"data_dir": str(tmp_path / "data"), "num_pages": 2048}
    with make_llm(model, **options) as llm:
        llm.load_adapter("mine", adapters["a1"])
        expected = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine"))
    (image,) = (tmp_path / "data" / "images").iterdir()
    before = image.stat().st_mtime_ns
    with make_llm(model, **options) as llm:
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine")) == expected
    assert image.stat().st_mtime_ns == before
    data = bytearray(image.read_bytes())
    data[-60_000] ^= 1
    image.write_bytes(data)
    with make_llm(model, **options) as llm:
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine")) == expected
    with make_llm(model, **options, kernels="native", dtype="bfloat16") as llm:  # type: ignore[arg-type]
        assert seen(llm.generate(PROMPTS[:1], GREEDY, adapter="mine")) != expected
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2


def test_what_cannot_be_had_is_left_out(
    model: Path, tmp_path: Path, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Of earlier runs and of a directory, as a server does; what was named must be there."""
    data, watched = tmp_path / "data", tmp_path / "watched"
    with make_llm(model, data_dir=str(data)) as llm:
        llm.load_adapter("large", write_adapter(tmp_path / "large", 1, rank=220))
        llm.load_adapter("small", adapters["a0"])
    for name in ("broken", "good", "small"):
        write_adapter(watched / name, 7)
    (watched / "broken" / "adapter_config.json").write_text("{")
    options = {"data_dir": str(data), "max_adapter_mb": 1, "adapter_dir": str(watched)}
    with make_llm(model, **options, adapter=(f"small={adapters['a1']}",)) as llm:
        assert llm.adapters() == ("good", "small")
        small = seen(llm.generate(PROMPTS[:1], GREEDY, adapter="small"))
        assert small == seen(llm.generate(PROMPTS[:1], GREEDY, adapter=adapters["a1"]))
    for words in (
        "large: .*at most 1024 KiB",
        "broken: .*JSON object",
        "small in .* the name of another one",
    ):
        assert re.search(words, caplog.text)
    for named in (("x=nowhere",), (f"x={adapters['a0']}", f"x={adapters['a1']}")):
        with pytest.raises(TokenloomError, match="nowhere|another name"):
            make_llm(model, adapter=named)


def test_a_full_disk(
    model: Path, tmp_path: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: AdapterImage, path: Path) -> None:
        raise OSError(28, "No space left on device")

    with make_llm(model) as llm:
        monkeypatch.setattr(AdapterImage, "save", full)
        with pytest.raises(ModelError, match="No space left"):
            llm.load_adapter("mine", adapters["a1"])
        monkeypatch.undo()
        assert llm.adapters() == ()
        llm.load_adapter("mine", adapters["a1"])
