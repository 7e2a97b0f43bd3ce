"""config.json and generation_config.json: both spellings, defaults, and refusals that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.hf_fixtures import TINY, write_model
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import ModelError
from tokenloom.models.config import ModelConfig
from tokenloom.models.hf_config import parse_config, read_config, read_generation_defaults
from tokenloom.models.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


OLMOE = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts_per_tok": 1}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64}


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny config with fields changed; None removes one."""
    return {name: value for name, value in (TINY | changes).items() if value is not None}


def test_fields_are_read():
    config = parse_config(tiny(attention_bias=True, torch_dtype="bfloat16", eos_token_id=[2, 3, 2]))
    assert (config.family, config.vocab_size, config.num_layers) == ("llama", 64, 2)
    assert (config.head_dim, config.q_size, config.kv_size) == (8, 32, 16)
    assert (config.attention_bias, config.mlp_bias, config.dtype) == (True, False, "bfloat16")
    assert (config.bos_token_id, config.eos_token_ids, config.max_context) == (1, (2, 3), 128)
    assert config.rope.rotary_dim == 8


def test_head_dim_and_kv_heads_are_optional():
    config = parse_config(tiny(num_key_value_heads=None, head_dim=16))
    assert (config.num_kv_heads, config.head_dim, config.q_size) == (4, 16, 64)


def test_both_transformers_spellings_agree():
    old = parse_config(tiny(rope_scaling=LLAMA3, rope_theta=5e5))
    named_type = {("type" if name == "rope_type" else name): value for name, value in LLAMA3.items()}
    oldest = parse_config(tiny(rope_scaling=named_type, rope_theta=5e5))
    new = tiny(
        rope_parameters=LLAMA3 | {"rope_theta": 5e5}, rope_theta=None, torch_dtype=None, dtype="float32"
    )
    assert old == oldest == parse_config(new)


@pytest.mark.parametrize("rope", [None, {"rope_theta": 5e5, **LLAMA3}])
def test_reads_what_transformers_writes(tmp_path: Path, rope: dict[str, Any] | None):
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(
        **{k: v for k, v in TINY.items() if k not in ("rope_theta", "torch_dtype")},
        rope_parameters=rope,
        dtype="bfloat16",
    )
    written.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.dtype == "bfloat16"
    assert config.rope.theta == (5e5 if rope else 1e4)
    assert config.rope.kind == ("llama3" if rope else "default")
    assert config.rms_norm_eps == written.rms_norm_eps


def test_generation_config_wins_for_eos(tmp_path: Path):
    write_model(
        tmp_path,
        TINY,
        generation={"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 40, "do_sample": True},
    )
    assert read_config(tmp_path).eos_token_ids == (5, 6)
    defaults = read_generation_defaults(tmp_path)
    assert defaults.do_sample is True
    assert defaults.as_sampling() == {"temperature": 0.6, "top_k": 40}
    SamplingParams(**defaults.as_sampling())


def test_generation_config_without_eos_leaves_that_of_the_config(tmp_path: Path):
    write_model(tmp_path, TINY, generation={"max_new_tokens": 9})
    assert read_config(tmp_path).eos_token_ids == (2,)
    assert read_generation_defaults(tmp_path).as_sampling() == {"max_tokens": 9}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 1.5),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
        ("min_p", 2),
    ],
)
def test_generation_values_out_of_limits(tmp_path: Path, field: str, value: Any):
    write_model(tmp_path, TINY, generation={field: value})
    with pytest.raises(ModelError, match=field):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": 10**40}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        (OLMOE | {"num_hidden_layers": 1024, "num_experts": 65}, "num_experts = 65"),
        (GPT2 | {"head_dim": 4}, "head_dim"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 4096}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"eos_token_id": 64}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e6}, "max_position_embeddings": 1 << 26},
            "stretched",
        ),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_fast"),
        ({"rope_scaling": {"type": "longrope", "factor": 2, "short_factor": [1.0]}}, "short_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor",
        ),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], named: str):
    with pytest.raises(ModelError) as caught:
        parse_config(tiny(**changes))
    assert named in str(caught.value)
    assert caught.value.supported
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"type": "default"}, 128),
        ({"type": "linear", "factor": 4}, 512),
        (LLAMA3, 128),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 4}, 512),
        ({"type": "dynamic", "factor": 4}, 128),
        ({"type": "longrope", "short_factor": [1.0] * 4, "original_max_position_embeddings": 32}, 32),
    ],
)
def test_served_context(rope: dict[str, Any], context: int):
    assert parse_config(tiny(rope_scaling=rope)).max_context == context


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 200_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_broken_json(tmp_path: Path, text: bytes):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_directory_and_file(tmp_path: Path):
    with pytest.raises(ModelError, match="no directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"without config\.json"):
        read_config(tmp_path)


def test_huge_config_is_not_read(tmp_path: Path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ModelError, match="bytes"):
        read_config(tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 1 << 62]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
rope_names = [
    "factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "mscale",
]
rope_names += ["mscale_all_dim", "truncate", "original_max_position_embeddings", "rope_theta", "short_factor"]
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", "longrope"])},
    optional={name: json_values | st.floats(1, 100) | st.integers(1, 1000) for name in rope_names},
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*TINY, "head_dim", "quantization_config", "mlp_bias"]), json_values, max_size=3
    ),
    st.none() | json_values | ropes,
)
def test_mutated_config_is_read_or_refused(changes: dict[str, Any], rope: Any):
    data = json.loads(json.dumps(TINY | changes | {"rope_scaling": rope}).replace("Infinity", "1e999"))
    try:
        config = parse_config(data)
    except ModelError:
        return
    assert isinstance(config, ModelConfig)
    frequencies, scale = inverse_frequencies(config.rope)
    assert scale > 0
    assert len(frequencies) == config.head_dim // 2


def test_what_a_message_quotes_is_cut():
    error = ModelError("x" * 1_000_000, "less")
    assert (len(error.found), error.found[-4:]) == (8192, "x...")
    assert str(error).endswith("; supported: less")
    assert ModelError("x" * 8192, "less").found == "x" * 8192
