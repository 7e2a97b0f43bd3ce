"""quantization_config: what is read from it, and refusals by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.hf_fixtures import TINY
from tokenloom.errors import ModelError
from tokenloom.models.loading import describe_model
from tokenloom.quantization.awq import AwqLinear
from tokenloom.quantization.config import WeightQuantization, parse_quantization
from tokenloom.quantization.fp8 import Fp8Linear
from tokenloom.quantization.gptq import GptqLinear
from tokenloom.quantization.selection import NameSelection

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 64,
                "symmetric": True,
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head"],
}


def parse(written: Any) -> WeightQuantization | None:
    return parse_quantization({"quantization_config": written})


def test_none() -> None:
    assert parse_quantization({}) is None
    assert parse(None) is None


def parsed(written: Any) -> WeightQuantization:
    found = parse(written)
    assert found is not None
    return found


def test_awq() -> None:
    assert parsed(AWQ) == WeightQuantization(method="awq", formats=((NameSelection(), AwqLinear(128)),))
    found = parsed(AWQ | {"version": "GEMM", "modules_to_not_convert": ["o_proj"], "do_fuse": False})
    assert found.format_of("model.layers.3.self_attn.o_proj") is None
    assert found.format_of("lm_head") is None
    assert found.is_final and not found.by_type
    linear = found.format_of("model.layers.3.self_attn.q_proj")
    assert linear == AwqLinear(128)
    assert (linear.parts, linear.optional_parts) == (("qweight", "qzeros", "scales"), ())


def test_gptq() -> None:
    found = parsed(GPTQ)
    linear = GptqLinear(group=32, zero_offset=1, symmetric=True)
    assert found == WeightQuantization(method="gptq", formats=((NameSelection(), linear),))
    assert linear.optional_parts == ("g_idx",)
    assert found.format_of("lm_head") is None
    for field in ("checkpoint_format", "format"):
        second = parsed(GPTQ | {field: "gptq_v2", "lm_head": True}).format_of("lm_head")
        assert second == GptqLinear(group=32, zero_offset=0, symmetric=True)
    ordered = parsed(GPTQ | {"desc_act": True}).format_of("x")
    assert ordered is not None
    assert ordered.parts == ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, ("int4", 32)),
        ({"group_size": 256}, ("int4", 128)),
        ({"group_size": 96}, ("int4", 32)),
        ({"group_size": -1}, ("int4", 128)),
        ({"bits": 8}, ("float32", 0)),
        ({"bits": 8, "group_size": -1}, ("int8", 0)),
        ({"bits": 8, "group_size": -1, "sym": False}, ("float32", 0)),
    ],
)
def test_forms_of_gptq(changes: dict[str, Any], form: tuple[str, int]) -> None:
    found = parsed(GPTQ | changes)
    assert [linear.form for _, linear in found.formats] == [form]
    assert found.is_final == (form[0] != "float32")


def test_fp8() -> None:
    found = parsed({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 64]})
    assert found.format_of("model.layers.0.mlp.up_proj") == Fp8Linear((128, 64))
    assert found.by_type and not found.is_final
    found = parsed({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]})
    assert found.format_of("model.layers.0.mlp.up_proj") == Fp8Linear()
    assert found.format_of("lm_head") is None


def test_gptq_of_some_modules() -> None:
    lists = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]
    found = parsed(GPTQ | {"modules_in_block_to_quantize": lists})
    assert found.format_of("model.layers.0.self_attn.k_proj") is not None
    assert found.format_of("model.layers.0.mlp.down_proj") is not None
    assert found.format_of("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"quant_method": "compressed-tensors", "bits": 4}, "without quantization_config.config_groups"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size = \[128\]"),
        (FP8 | {"weight_block_size": [0, 128]}, r"weight_block_size = \[0, 128\]"),
        (FP8 | {"weight_block_size": [128, 10**30]}, r"weight_block_size = \[128, 10{30}\]"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size = 128"),
        (FP8 | {"activation_scheme": "other"}, "activation_scheme = 'other'"),
        (FP8 | {"fmt": "e3m4"}, "fmt = 'e3m4'"),
        (FP8 | {"ignored_layers": "lm_head"}, "ignored_layers"),
        ({"bits": 4}, "without quantization_config.quant_method"),
        ({"quant_method": ["awq"]}, "quant_method"),
        (AWQ | {"bits": 8}, "quantization_config.bits = 8"),
        (AWQ | {"bits": True}, "bits = True"),
        (AWQ | {"bits": 4.0}, r"bits = 4\.0"),
        (AWQ | {"group_size": -2}, "group_size = -2"),
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
        (GPTQ | {"bits": 3}, r"bits = 3 \(quant_method 'gptq'\)"),
        (GPTQ | {"bits": 2}, "bits = 2"),
        (GPTQ | {"group_size": 0}, "group_size = 0"),
        (GPTQ | {"group_size": 1 << 30}, "group_size = 1073741824"),
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


REFUSED = [
    *[
        ({"quant_method": name}, f"quant_method = '{name}'")
        for name in (
            "aqlm",
            "auto-round",
            "awq_marlin",
            "bitnet",
            "bitsandbytes",
            "eetq",
            "exl2",
            "fbgemm_fp8",
            "fp_quant",
            "gptq_marlin",
            "higgs",
            "hqq",
            "marlin",
            "modelopt",
            "mxfp4",
            "nvfp4",
            "quanto",
            "quip",
            "quip_sharp",
            "sparseml",
            "spqr",
            "torchao",
            "vptq",
            "FP8",
            "",
        )
    ],
    *[
        (COMPRESSED | {"format": name}, f"format = '{name}'")
        for name in (
            "dense",
            "sparse-bitmask",
            "sparse-24-bitmask",
            "marlin-24",
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "mxfp6-pack-quantized",
            "mxfp8-quantized",
        )
    ],
    (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (COMPRESSED | {"sparsity_config": 4}, "sparsity_config = 4"),
    (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    (AWQ | {"version": "marlin"}, "version = 'marlin'"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    (GPTQ | {"checkpoint_format": "bitblas"}, "checkpoint_format = 'bitblas'"),
]


@pytest.mark.parametrize(("written", "named"), REFUSED)
def test_formats_that_are_refused_by_name(tmp_path: Path, written: dict[str, Any], named: str) -> None:
    """Before any tensor is looked at: there is none."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"quantization_config": written}))
    with pytest.raises(ModelError, match=re.escape(f"config.json: quantization_config.{named}")):
        describe_model(tmp_path)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.sampled_from([AWQ, GPTQ, FP8, COMPRESSED]),
    st.dictionaries(
        st.sampled_from([*AWQ, *GPTQ, *FP8, *COMPRESSED, "dynamic", "modules_to_not_convert", "backend"]),
        junk,
        max_size=3,
    ),
)
def test_anything_is_read_or_refused(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        found = parsed(base | changes)
    except ModelError:
        return
    assert all(linear.form[1] in (0, 32, 64, 128) for _, linear in found.formats)
