"""The comparison of two models against sums over single distributions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.models.hf_fixtures import TINY, llama_tensors, write_model
from tokenloom.bench.quantization_report import (
    compare,
    cut,
    held_out_text,
    next_token_logprobs,
    weight_sizes,
)
from tokenloom.errors import InvalidParameter
from tokenloom.models.loading import load_model
from tokenloom.models.memory_plan import MemoryPlan
from tokenloom.runtime.local import LocalExecutor

VOCAB = 64
TEXT = np.random.default_rng(1).integers(0, VOCAB, 150).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TINY | {"max_position_embeddings": 256}
    tensors = llama_tensors(config)
    # A head that tells tokens apart.
    tensors["lm_head.weight"] *= 8
    return write_model(tmp_path_factory.mktemp("model"), config, tensors)


def executor(directory: Path, weights: str) -> LocalExecutor:
    model = load_model(directory, weights=weights)
    plan = MemoryPlan.fit(model.config, model.program, max_batch_tokens=64, max_running=1)
    return LocalExecutor(
        model.program,
        model.weights,
        model.rope,
        num_frames=plan.num_frames,
        frame_bytes=plan.frame_bytes,
        pages_per_frame=plan.pages_per_frame,
    )


def distributions(runner: LocalExecutor, window: list[int]) -> tuple[np.ndarray, np.ndarray]:
    parts = list(next_token_logprobs(runner, window, VOCAB))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def test_distributions_are_whole_and_do_not_depend_on_the_cut(directory: Path) -> None:
    runner = executor(directory, "auto")
    wanted, logprobs = distributions(runner, TEXT)
    assert wanted.tolist() == TEXT[1:]
    assert logprobs.shape == (149, VOCAB)
    assert np.allclose(np.exp(logprobs).sum(axis=1), 1, atol=1e-5)
    for length in (2, 17, 64, 65, 66, 129):
        assert (distributions(runner, TEXT[:length])[1] == logprobs[: length - 1]).all()


def test_compare_is_the_sum_over_single_tokens(directory: Path) -> None:
    first, second = executor(directory, "auto"), executor(directory, "int4")
    windows = [TEXT[:100], TEXT[100:103], TEXT[103:]]
    heard: list[int] = []
    found = compare(first, second, windows, VOCAB, heard.append)
    losses: list[float] = []
    rounded: list[float] = []
    divergences: list[float] = []
    same = 0
    for window in windows:
        (wanted, p), (_, q) = distributions(first, window), distributions(second, window)
        for row, token in enumerate(wanted.tolist()):
            losses.append(-p[row, token])
            rounded.append(-q[row, token])
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p[row], q[row], strict=True)))
            same += max(range(VOCAB), key=lambda i: p[row, i]) == max(range(VOCAB), key=lambda i: q[row, i])
    count = len(losses)
    assert found.num_tokens == count == 99 + 2 + 46
    assert heard[-1] == count
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / count))
    assert found.perplexity_quantized == pytest.approx(math.exp(sum(rounded) / count))
    assert found.mean_kl == pytest.approx(sum(divergences) / count)
    assert found.max_kl == pytest.approx(max(divergences))
    assert found.same_argmax == same / count
    assert 0 < found.mean_kl < found.max_kl
    assert found.perplexity != found.perplexity_quantized


def test_a_model_equals_itself_and_8_bits_are_closer_than_4(directory: Path) -> None:
    first = executor(directory, "auto")
    itself, eight, four = (
        compare(first, executor(directory, weights), [TEXT], VOCAB) for weights in ("auto", "int8", "int4")
    )
    assert (itself.mean_kl, itself.max_kl, itself.same_argmax) == (0, 0, 1)
    assert itself.perplexity == itself.perplexity_quantized
    assert 0 < eight.mean_kl < four.mean_kl
    assert eight.same_argmax >= four.same_argmax


def test_windows() -> None:
    assert cut(TEXT, 64, 10_000) == [TEXT[:64], TEXT[64:128], TEXT[128:]]
    assert cut(TEXT[:129], 64, 10_000) == [TEXT[:64], TEXT[64:128]]
    assert cut(TEXT, 64, 63) == [TEXT[:64]]
    assert cut(TEXT, 64, 64) == [TEXT[:64], TEXT[64:66]]
    assert cut(TEXT, 64, 5) == [TEXT[:6]]
    for tokens in ([], [1]):
        with pytest.raises(InvalidParameter, match="at least two tokens"):
            cut(tokens, 64, 5)


def test_sizes(directory: Path) -> None:
    before, after = weight_sizes(directory, "int8")
    assert before == (directory / "model.safetensors").stat().st_size // 4 * 4 - header_bytes(directory)
    assert weight_sizes(directory, "int4")[1] < after < before / 2


def header_bytes(directory: Path) -> int:
    data = (directory / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_the_stories_are_there() -> None:
    assert 400 < len(held_out_text().split()) < 2000
