"""RoPE tables against transformers, for every rope type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.hf_fixtures import TINY
from tokenloom.errors import InvalidParameter, OutOfMemory
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import parse_config
from tokenloom.models.rope import inverse_frequencies, limit_context, rope_tables

LONG = [1.0 + 0.05 * i for i in range(64)]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-odd": {"rope_type": "linear", "factor": 2.7},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "llama3.2": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-without-factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    "yarn-smooth": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 1024,
        "truncate": False,
        "beta_fast": 20,
        "beta_slow": 2,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 3.3},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 1024},
    "longrope-factor": {"rope_type": "longrope", "original_max_position_embeddings": 2048, "factor": 32.0},
    "longrope-attention": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 2048,
        "factor": 4.0,
        "attention_factor": 1.1,
    },
}


def build(name: str, theta: float, head_dim: int, context: int = 4096) -> tuple[ModelConfig, dict[str, Any]]:
    """Our config, and the keywords of the same config for transformers."""
    rope = dict(ROPES[name])
    if rope["rope_type"] == "longrope":
        rope |= {"short_factor": LONG[: head_dim // 2], "long_factor": [4.0] * (head_dim // 2)}
    dropped = ("rope_theta", "torch_dtype", "model_type", "architectures")
    data = {k: v for k, v in TINY.items() if k not in dropped}
    data |= {
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_parameters": rope | {"rope_theta": theta},
    }
    return parse_config(data | {"model_type": "llama"}), data


@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 32), (500000.0, 64), (1e6, 128), (10000.0, 80)])
@pytest.mark.parametrize("name", ROPES)
def test_equals_transformers(name: str, theta: float, head_dim: int):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config, data = build(name, theta, head_dim)
    oracle = modeling.LlamaRotaryEmbedding(modeling.LlamaConfig(**data))
    context = config.max_context if config.rope.kind in ("dynamic", "longrope") else 4096
    cos, sin = rope_tables(config, context)
    want_cos, want_sin = oracle(torch.zeros(1), torch.arange(context)[None])
    half = head_dim // 2
    frequencies, scale = inverse_frequencies(config.rope)
    theirs = oracle.inv_freq.numpy()
    assert scale == pytest.approx(oracle.attention_scaling, rel=1e-15)
    # Their power function is off the correctly rounded one by a unit in the last place in 1 of 150 cases, and
    # the steps after it may double that.
    np.testing.assert_array_max_ulp(frequencies, theirs, maxulp=3)
    assert cos.shape == sin.shape == (context, half)
    assert cos.dtype == sin.dtype == np.float32
    # An angle is rounded to float32 twice (its frequency, and times the position).
    angles = np.arange(context)[:, None] * theirs.astype(np.float64)
    allowed = (2.0**-22 + np.abs(angles) * (frequencies != theirs) * 2.0**-21 + angles * 2.0**-23) * max(
        scale, 1
    )
    assert (np.abs(cos - want_cos[0, :, :half].numpy()) <= allowed).all()
    assert (np.abs(sin - want_sin[0, :, :half].numpy()) <= allowed).all()
    same = frequencies == theirs
    np.testing.assert_allclose(cos[:, same], want_cos[0, :, :half].numpy()[:, same], rtol=0, atol=2.5e-7)
    np.testing.assert_allclose(sin[:, same], want_sin[0, :, :half].numpy()[:, same], rtol=0, atol=2.5e-7)


def test_rows_do_not_depend_on_the_length():
    config, _ = build("yarn", 10000.0, 64, context=20000)
    for long, short in zip(rope_tables(config, 9001), rope_tables(config, 17), strict=True):
        assert (long[:17] == short).all()
    assert rope_tables(config)[0].shape == (20000, 32)


@pytest.mark.parametrize(("name", "original"), [("dynamic", 4096), ("longrope", 1024)])
def test_stops_at_the_original_length(name: str, original: int):
    config, _ = build(name, 10000.0, 32)
    assert config.max_context == original
    with pytest.raises(InvalidParameter, match=f"'{name}' is served up to its original length {original}"):
        rope_tables(config, original + 1)


def test_limit_context():
    config, _ = build("default", 10000.0, 32)
    assert limit_context(config, None) == limit_context(config, 0) == config
    assert limit_context(config, 100).max_context == 100
    for wrong in (-1, 4097):
        with pytest.raises(InvalidParameter, match="max_context"):
            limit_context(config, wrong)


def test_tables_are_bounded():
    config, _ = build("default", 10000.0, 128, context=1 << 26)
    with pytest.raises(OutOfMemory, match="set max_context to at most 2097152"):
        rope_tables(config)
