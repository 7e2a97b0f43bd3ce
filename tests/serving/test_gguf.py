"""From a GGUF file to tokens: in this process, and over HTTP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models.gguf_fixtures import VOCAB, gguf, random_model, write_gguf
from tests.serving_process import serving
from tokenloom import LLM, SamplingParams
from tokenloom.errors import ModelError
from tokenloom.kernels.native import extension
from tokenloom.models.loading import load_model
from tokenloom.serving.model_directory import model_directory, model_name

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {"num_pages": 32, "max_running": 4, "max_batch_tokens": 64}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}a: "
PROMPTS = [[1, 5, 9], list(range(3, 40)), [7]]
NATIVE = pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file and, beside it, the same model as transformers saves it."""
    path = tmp_path_factory.mktemp("served") / "tiny.Q4_0.gguf"
    model = random_model("Llama", {"max_position_embeddings": 512})
    template = {"tokenizer.chat_template": (TEMPLATE, gguf.GGUFValueType.STRING)}
    write_gguf(path, model, lambda name, shape: "Q4_0" if "blk" in name else "F16", metadata=template)
    model.save_pretrained(path.parent / "saved")
    return path


def generated(path: Path, **options: Any) -> list[list[int]]:
    with LLM(str(path), **OPTIONS, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def test_the_file_holds_what_the_saved_model_holds(model_file: Path) -> None:
    ours, theirs = load_model(model_file, weights="float"), load_model(model_file.parent / "saved")
    assert ours.config.num_layers == theirs.config.num_layers
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in ours.weights.items():
        assert (weight == theirs.weights[name]).all(), name


@pytest.mark.parametrize("weights", ["auto", "float", "int8", "int4"])
def test_a_file_and_a_directory_with_it_generate_the_same(
    model_file: Path, tmp_path: Path, weights: str
) -> None:
    shutil.copy(model_file, tmp_path / "x.gguf")
    found = generated(model_file, weights=weights)
    assert all(len(tokens) == 12 for tokens in found)
    assert found == generated(tmp_path, weights=weights)


def test_texts_and_chats(model_file: Path) -> None:
    with LLM(str(model_file), **OPTIONS) as llm:
        assert llm.card.name == "tiny.Q4_0"
        assert llm.card.vocab_size == VOCAB
        output = llm.generate("abc", PARAMS)[0]
        assert output.prompt_token_ids == [1, *llm.encode("abc", add_special_tokens=False)]
        chat = llm.chat([{"role": "user", "content": "abc"}], PARAMS)[0]
        assert chat.prompt_token_ids == llm.encode("user: abc\na: ", add_special_tokens=False)


def test_names_and_places(model_file: Path, tmp_path: Path) -> None:
    assert model_directory(str(model_file)) == model_file
    assert model_name(str(model_file), "") == "tiny.Q4_0"
    assert model_name(str(model_file), "mine") == "mine"
    with pytest.raises(ModelError, match="no directory"):
        model_directory(str(tmp_path / "absent.gguf"))


def test_a_broken_file_is_refused(tmp_path: Path, model_file: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="ends at byte"):
        LLM(str(path), **OPTIONS)


@NATIVE
def test_served_over_http(model_file: Path) -> None:
    with serving(str(model_file), "--num-pages", "32", "--max-running", "4") as server:
        names = [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert names == ["tiny.Q4_0"]
        body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": names[0], **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
