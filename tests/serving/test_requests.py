"""Requests as the faces make them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.serving.helpers import write_tokenizer
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.serving.model_directory import EMBEDDED, model_directory, model_name
from tokenloom.serving.requests import SeedSource, bad_word_ids, make_request
from tokenloom.serving.threads import num_threads, thread_environment
from tokenloom.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_directory)


def test_bad_words_with_and_without_space(tokenizer: Tokenizer) -> None:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, False))

    assert list(bad_word_ids(tokenizer, ["ab", " ab", "c"])) == [
        encode("ab"),
        encode(" ab"),
        encode("c"),
        encode(" c"),
    ]
    request = make_request(tokenizer, (1, 2), SamplingParams(bad_words=["x"]), request_id="r", priority=3)
    assert request.bad_word_ids == (encode("x"), encode(" x"))
    assert request.prompt_token_ids == [1, 2]
    assert request.priority == 3
    assert make_request(tokenizer, [1], SamplingParams(), request_id="r").bad_word_ids == ()


def test_bad_words_of_one_token_each(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text gives the same tokens twice."""
    vocab = {"Ġ": 0, "a": 1, "Ġa": 2}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert list(bad_word_ids(Tokenizer.from_dir(tmp_path), ["a"])) == [(2,)]


def test_a_bad_word_without_letters_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParameter, match="bad_words"):
        make_request(tokenizer, [1], SamplingParams(bad_words=["  "]), request_id="r")


def test_derived_seeds() -> None:
    first, second = SeedSource(3), SeedSource(3)
    seeds = [first.fill(SamplingParams()).seed for _ in range(3)]
    assert seeds == [second.fill(SamplingParams()).seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert first.fill(SamplingParams(seed=9)).seed == 9
    assert SeedSource().fill(SamplingParams()).seed is None


def test_model_directories(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "some-model")
    assert model_directory(str(directory)) == directory
    assert model_name(str(directory), "") == "some-model"
    assert model_name(str(directory), "other") == "other"
    assert model_name("", "") == EMBEDDED
    with pytest.raises(ModelError, match="no directory"):
        model_directory(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="a file"):
        model_directory(str(directory / "tokenizer.json"))


def test_thread_environment() -> None:
    assert num_threads(3) == 3
    assert num_threads(0) >= 1
    given = {"PATH": "p", "OPENBLAS_NUM_THREADS": "7"}
    assert thread_environment(3, given)["OPENBLAS_NUM_THREADS"] == "3"
    assert thread_environment(3, given)["PATH"] == "p"
    assert thread_environment(0, given)["OPENBLAS_NUM_THREADS"] == "7"
    assert thread_environment(0, {})["OPENBLAS_NUM_THREADS"] == str(num_threads(0))
