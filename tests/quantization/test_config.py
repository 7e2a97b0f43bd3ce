"""quantization_config: what is read from it, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.errors import ModelError
from tokenloom.quantization.config import WeightQuantization, parse_quantization

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def parse(written: Any) -> WeightQuantization | None:
    return parse_quantization({"quantization_config": written})


def test_none() -> None:
    assert parse_quantization({}) is None
    assert parse(None) is None


def test_awq() -> None:
    assert parse(AWQ) == WeightQuantization(method="awq", group=128)
    found = parse(AWQ | {"version": "GEMM", "modules_to_not_convert": ["o_proj"], "do_fuse": False})
    assert found is not None
    assert found.parts == ("qweight", "qzeros", "scales")
    assert found.optional_parts == ()
    assert not found.converts("model.layers.3.self_attn.o_proj")
    assert found.converts("model.layers.3.self_attn.q_proj")
    assert not found.converts("lm_head")


def test_gptq() -> None:
    found = parse(GPTQ)
    assert found == WeightQuantization(method="gptq", group=32, zero_offset=1, symmetric=True)
    assert found.optional_parts == ("g_idx",)
    assert not found.converts("lm_head")
    for field in ("checkpoint_format", "format"):
        second = parse(GPTQ | {field: "gptq_v2", "lm_head": True})
        assert second is not None
        assert second.zero_offset == 0
        assert second.converts("lm_head")
    ordered = parse(GPTQ | {"desc_act": True})
    assert ordered is not None
    assert ordered.parts == ("qweight", "qzeros", "scales", "g_idx")


def test_gptq_of_some_modules() -> None:
    lists = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]
    found = parse(GPTQ | {"modules_in_block_to_quantize": lists})
    assert found is not None
    assert found.converts("model.layers.0.self_attn.k_proj")
    assert found.converts("model.layers.0.mlp.down_proj")
    assert not found.converts("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("written", "named"),
    [
        *[({"quant_method": name}, f"quant_method = '{name}'") for name in ("bitsandbytes", "fp8", "marlin")],
        ({"quant_method": "compressed-tensors", "bits": 4}, "'compressed-tensors'"),
        ({"bits": 4}, "without quantization_config.quant_method"),
        ({"quant_method": ["awq"]}, "quant_method"),
        (AWQ | {"bits": 8}, "quantization_config.bits = 8"),
        (AWQ | {"bits": True}, "bits = True"),
        (AWQ | {"bits": 4.0}, r"bits = 4\.0"),
        (AWQ | {"group_size": -1}, "group_size = -1"),
        (AWQ | {"group_size": 16}, "group_size = 16"),
        (AWQ | {"group_size": None}, "group_size = None"),
        (AWQ | {"version": "gemv"}, "version = 'gemv'"),
        (AWQ | {"version": "gemv_fast"}, "version = 'gemv_fast'"),
        (AWQ | {"version": None}, "version = None"),
        (AWQ | {"zero_point": False}, "zero_point = False"),
        (AWQ | {"zero_point": 1}, "zero_point = 1"),
        (AWQ | {"backend": "llm-awq"}, "backend = 'llm-awq'"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (AWQ | {"modules_to_not_convert": [""]}, "modules_to_not_convert"),
        (GPTQ | {"bits": 8}, r"bits = 8 \(quant_method 'gptq'\)"),
        (GPTQ | {"bits": 3}, "bits = 3"),
        (GPTQ | {"group_size": -1}, "group_size = -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        (GPTQ | {"format": ["gptq"]}, "format"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"desc_act": "no"}, "desc_act = 'no'"),
        (GPTQ | {"modules_in_block_to_quantize": [[3]]}, "modules_in_block_to_quantize"),
        ("awq", "quantization_config = 'awq'"),
        ([], r"quantization_config = \[\]"),
    ],
)
def test_refusals_name_field_and_value(written: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse(written)


def test_the_old_field_of_compressed_tensors() -> None:
    with pytest.raises(ModelError, match="compression_config"):
        parse_quantization({"compression_config": {"format": "pack-quantized"}})


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.sampled_from([AWQ, GPTQ]),
    st.dictionaries(
        st.sampled_from([*AWQ, *GPTQ, "dynamic", "format", "modules_to_not_convert", "backend"]),
        junk,
        max_size=3,
    ),
)
def test_anything_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        found = parse(base | changes)
    except ModelError:
        return
    assert found is not None
    assert found.group in (32, 64, 128)
