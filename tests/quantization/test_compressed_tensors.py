"""Parts of compressed-tensors against the package that writes them, parts that are wrong, and configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.quantization.compressed import Parts, compress, torch
from tokenloom.errors import ModelError
from tokenloom.quantization.compressed_tensors import Int8Linear, PackedLinear
from tokenloom.quantization.config import WeightQuantization, parse_quantization
from tokenloom.quantization.fp8 import Fp8Linear
from tokenloom.quantization.linear_format import LinearFormat, unpack_linear
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix


def config(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def parsed(written: dict[str, Any], field: str = "quantization_config") -> WeightQuantization:
    found = parse_quantization({field: written})
    assert found is not None
    return found


def format_of(layout: str, **weights: Any) -> LinearFormat:
    found = parsed(config(layout, **weights)).format_of("model.layers.0.mlp.up_proj")
    assert found is not None
    return found


def matrix(rows: int, depth: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32) * np.float32(0.05)
    values[0, 0] = -1  # the lowest number of a symmetric row
    return values


def values_of(found: Any) -> np.ndarray:
    return found if isinstance(found, np.ndarray) else found.dequantize()


GROUP = {"strategy": "group", "group_size": 32}
CASES = [
    ("pack-quantized", {"num_bits": 4, **GROUP}, Int4Matrix),
    ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, Int4Matrix),
    ("pack-quantized", {"num_bits": 4, **GROUP, "symmetric": False}, Int4Matrix),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, Int4Matrix),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}, Int4Matrix),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, Int8Matrix),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, np.ndarray),
    ("pack-quantized", {"num_bits": 8, **GROUP}, np.ndarray),
    ("pack-quantized", {"num_bits": 8, **GROUP, "symmetric": False}, np.ndarray),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, Int8Matrix),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, Int8Matrix),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, np.ndarray),
    ("int-quantized", {"num_bits": 8, **GROUP}, np.ndarray),
    ("naive-quantized", {"num_bits": 8, "strategy": "channel"}, Int8Matrix),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, np.ndarray),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, np.ndarray),
    (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        np.ndarray,
    ),
    ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, np.ndarray),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "depth"), [(40, 256), (24, 128)])
@pytest.mark.parametrize(("layout", "weights", "kind"), CASES)
def test_what_the_package_reads(
    layout: str, weights: dict[str, Any], kind: type, rows: int, depth: int, dtype: str
) -> None:
    parts, wanted = compress(matrix(rows, depth), layout, getattr(torch, dtype), **weights)
    linear = format_of(layout, **weights)
    assert linear.shape("x", {name: part.shape for name, part in parts.items()}) == (rows, depth)
    found = unpack_linear(linear, "x", parts)
    assert isinstance(found, kind)
    kinds = {Int4Matrix: "int4", Int8Matrix: "int8", np.ndarray: "float32"}
    assert linear.form == (kinds[kind], getattr(found, "group", 0))
    if kind is Int4Matrix and dtype == "float32":
        # Scales are rounded to float16.
        np.testing.assert_allclose(values_of(found), wanted, rtol=2.0**-11, atol=0)
    else:
        assert (values_of(found) == wanted).all()
    if kind is Int8Matrix and weights["strategy"] == "channel":
        assert found.q.min() == -128


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_do_not_fill_words_of_zeros(bits: int, symmetric: bool) -> None:
    weights = {"num_bits": bits, **GROUP, "symmetric": symmetric}
    parts, wanted = compress(matrix(13, 64), "pack-quantized", torch.bfloat16, **weights)
    assert (values_of(unpack_linear(format_of("pack-quantized", **weights), "x", parts)) == wanted).all()


@pytest.mark.parametrize("group", [96, 1 << 20])
def test_a_last_group_that_is_shorter(group: int) -> None:
    parts, _ = compress(matrix(8, 200), "pack-quantized", torch.bfloat16, num_bits=4, strategy="channel")
    scales = np.linspace(0.01, 0.1, 8 * -(-200 // group)).astype(np.float16).reshape(8, -1)
    linear = format_of("pack-quantized", num_bits=4, strategy="group", group_size=group)
    found = unpack_linear(linear, "x", parts | {"weight_scale": scales})
    q = (parts["weight_packed"].view(np.uint32)[:, :, None] >> (4 * np.arange(8)) & 15).reshape(8, 200)
    wanted = (q.astype(np.float32) - 8) * scales.astype(np.float32)[:, np.arange(200) // group]
    assert (values_of(found) == wanted).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order(bits: int) -> None:
    """Releases that still wrote weight_g_idx took the scale of column k from its group; so does the oracle."""
    weights = {"num_bits": bits, **GROUP, "symmetric": False}
    parts, _ = compress(matrix(16, 128), "pack-quantized", torch.bfloat16, **weights)
    groups = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    per_word = 32 // bits
    shifts = np.arange(per_word) * bits
    q = (parts["weight_packed"].view(np.uint32)[:, :, None] >> shifts & ((1 << bits) - 1)).reshape(16, 128)
    zeros = parts["weight_zero_point"].view(np.uint32)[:, None] >> shifts[:, None] & ((1 << bits) - 1)
    zeros = zeros.reshape(16, 4)
    wanted = (q.astype(np.float32) - zeros[:, groups].astype(np.float32)) * parts["weight_scale"].astype(
        np.float32
    )[:, groups]
    linear = format_of("pack-quantized", **weights)
    found = unpack_linear(linear, "x", parts | {"weight_g_idx": groups})
    order = linear.input_order("x", groups)
    assert (order is None) == (bits == 8)
    assert (values_of(found) == (wanted if order is None else wanted[:, order])).all()
    unset = np.full(128, -1, np.int32)
    same = unpack_linear(linear, "x", parts | {"weight_g_idx": unset})
    assert (values_of(same) == values_of(unpack_linear(linear, "x", parts))).all()
    assert linear.input_order("x", unset) is None


Bend = Callable[[Parts], Any]


def put(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Bend:
    return lambda parts: parts.update({part: change(parts[part])})


def one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, value, a).astype(a.dtype)


PACKED = {"num_bits": 4, **GROUP, "symmetric": False}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
BAD: list[tuple[str, dict[str, Any], Bend, str]] = [
    ("pack-quantized", PACKED, put("weight_scale", one(np.nan)), r"weight_scale with a value that is not finite"),
    ("pack-quantized", PACKED, put("weight_scale", one(np.inf)), r"weight_scale with a value that is not finite"),
    ("pack-quantized", PACKED, put("weight_scale", one(1e6)), r"weight_scale with the value 1e\+06"),
    ("pack-quantized", PACKED, put("weight_scale", lambda a: a[:, :1]), r"weight_scale of shape \[16, 1\]"),
    ("pack-quantized", PACKED, put("weight_scale", lambda a: a.T), r"weight_scale of shape"),
    ("pack-quantized", PACKED, put("weight_scale", lambda a: a.astype(np.int32)), r"weight_scale of dtype int32"),
    ("pack-quantized", PACKED, put("weight_zero_point", lambda a: a.T), r"weight_zero_point of shape \[4, 2\]"),
    ("pack-quantized", PACKED, put("weight_zero_point", lambda a: a.astype(np.int8)), r"weight_zero_point of dtype"),
    ("pack-quantized", PACKED, put("weight_packed", lambda a: a[0]), r"weight_packed of shape .* a matrix"),
    ("pack-quantized", PACKED, put("weight_packed", lambda a: a[:, :0]), r"weight_packed of shape .* a matrix"),
    ("pack-quantized", PACKED, put("weight_packed", lambda a: a.astype(np.int64)), r"weight_packed of dtype int64"),
    ("pack-quantized", PACKED, put("weight_shape", lambda a: a + 1), r"weight_shape = \[17, 129\]"),
    ("pack-quantized", PACKED, put("weight_shape", lambda a: a[:1]), r"weight_shape of shape \[1\]"),
    (
        "pack-quantized",
        PACKED,
        lambda parts: parts.update(weight_g_idx=np.zeros(128, np.int32)),
        r"weight_g_idx with groups of different sizes",
    ),
    (
        "pack-quantized",
        PACKED,
        lambda parts: parts.update(weight_g_idx=np.zeros(127, np.int32)),
        r"weight_g_idx of shape \[127\]",
    ),
    ("int-quantized", CHANNEL, put("weight_scale", one(np.nan)), r"weight_scale with a value that is not finite"),
    ("int-quantized", CHANNEL, put("weight_scale", lambda a: a[:3]), r"weight_scale of shape \[3, 1\]"),
    ("int-quantized", CHANNEL, put("weight", lambda a: a.astype(np.int32)), r"weight of dtype int32"),
    ("int-quantized", CHANNEL, put("weight", lambda a: a.astype(ml_dtypes.float8_e5m2)), r"weight of dtype float8"),
    (
        "int-quantized",
        CHANNEL,
        lambda parts: parts.update(weight_zero_point=np.ones((16, 1), np.int8)),
        r"weight_zero_point that is not 0",
    ),
    ("float-quantized", FLOAT, put("weight", lambda a: a.view(np.int8)), r"weight of dtype int8"),
    ("float-quantized", FLOAT, put("weight_scale", one(np.inf)), r"weight_scale with a value that is not finite"),
    ("float-quantized", FLOAT, put("weight_scale", one(3e38)), r"weight with a value that is not finite"),
    ("float-quantized", FLOAT, lambda parts: parts.pop("weight_scale"), r"weight in float8 without its scale"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "weights", "bend", "named"), BAD)
def test_bad_parts_are_named(layout: str, weights: dict[str, Any], bend: Bend, named: str) -> None:
    parts, _ = compress(matrix(16, 128), layout, **weights)
    bend(parts)
    with pytest.raises(ModelError, match=r"x\.proj\." + named):
        unpack_linear(format_of(layout, **weights), "x.proj", parts)


# --- config.json -------------------------------------------------------------------------------------------


def test_which_linears() -> None:
    """The names and patterns of real configurations."""
    written = config("pack-quantized", num_bits=4, **GROUP)
    written["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj", "re:.*self_attn\\.(q|k)_proj$"]
    found = parsed(written)
    assert found.format_of("model.layers.1.mlp.down_proj") == PackedLinear(32)
    for left in ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.7.self_attn.k_proj"):
        assert found.format_of(left) is None
    assert found.format_of("model.layers.7.self_attn.v_proj") is not None


def test_mixed_precision() -> None:
    weights = {"num_bits": 4, **GROUP}
    written = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"},
            "b": {"targets": ["re:.*down_proj$"], "weights": FLOAT, "format": "float-quantized"},
            "c": {"targets": ["model.layers.3.mlp.down_proj"], "weights": CHANNEL, "format": "int-quantized"},
        },
    }
    found = parsed(written)
    assert found.format_of("model.layers.3.mlp.up_proj") == PackedLinear(32)
    assert found.format_of("model.layers.2.mlp.down_proj") == Fp8Linear((1, 0))
    assert found.format_of("model.layers.3.mlp.down_proj") == Int8Linear()
    assert found.format_of("lm_head") == PackedLinear(32)
    assert found.is_final


def test_what_is_said_of_others_is_ignored() -> None:
    written = config("int-quantized", **CHANNEL, observer="mse", actorder=None, dynamic=False)
    written["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    written |= {"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "sparsity_config": {"format": "dense"}}
    written |= {"transform_config": {}, "global_compression_ratio": 1.4, "version": "0.12"}
    assert parsed(written).format_of("x") == Int8Linear()


@pytest.mark.parametrize("method", [None, "sparseml", "compressed-tensors"])
def test_the_old_field(method: str | None) -> None:
    written = config("pack-quantized", num_bits=4, group_size=64) | {"quant_method": method}
    assert parsed(written, "compression_config").format_of("x") == PackedLinear(64)
    with pytest.raises(ModelError, match="compression_config.quant_method = 'gptq'"):
        parsed(written | {"quant_method": "gptq"}, "compression_config")


@pytest.mark.parametrize(
    ("layout", "weights", "named"),
    [
        ("pack-quantized", {"num_bits": 3}, "weights.num_bits = 3"),
        ("pack-quantized", {"num_bits": 2}, "weights.num_bits = 2"),
        ("pack-quantized", {"num_bits": True}, "weights.num_bits = True"),
        ("pack-quantized", {}, "without .*weights.num_bits"),
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, "weights.group_size = 16"),
        ("pack-quantized", {"num_bits": 4, "strategy": "group"}, "without .*weights.group_size"),
        ("pack-quantized", {"num_bits": 4, "strategy": "tensor_group"}, "strategy = 'tensor_group'"),
        ("pack-quantized", {"num_bits": 4, "strategy": "token"}, "strategy = 'token'"),
        (
            "pack-quantized",
            {"num_bits": 4, "strategy": "block", "block_structure": [8, 8]},
            "strategy = 'block'",
        ),
        ("pack-quantized", {"num_bits": 4, "dynamic": True}, "weights.dynamic = True"),
        ("pack-quantized", {"num_bits": 4, "type": "float"}, "weights.type = 'float'"),
        ("pack-quantized", {"num_bits": 4, "symmetric": "yes"}, "weights.symmetric = 'yes'"),
        ("int-quantized", {"num_bits": 4}, "weights.num_bits = 4"),
        ("int-quantized", {"num_bits": 8, "type": "float"}, "format"),
        ("float-quantized", {"num_bits": 4, "type": "float"}, "weights.num_bits = 4"),
        ("float-quantized", {"num_bits": 8, "type": "int"}, "format"),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": False},
            "weights.symmetric = False",
        ),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block"},
            "without .*block_structure",
        ),
        ("mixed-precision", {"num_bits": 4}, "group_0.format"),
    ],
)
def test_weights_that_are_refused(layout: str, weights: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parsed(config(layout, **weights))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config_groups": None}, "config_groups = None"),
        ({"config_groups": {}}, "config_groups = {}"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 = "),
        ({"config_groups": {"g": {"weights": {}}}}, "without .*config_groups.g.targets"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": None}}},
            "config_groups.g.weights = None",
        ),
        ({"config_groups": {"g": {"targets": [3]}}}, "config_groups.g.targets = "),
        ({"config_groups": {"g": {"targets": ["re:("]}}}, "a regular expression"),
        ({"config_groups": {str(i): {} for i in range(65)}}, "1 to 64 groups"),
        (
            {"config_groups": {str(i): {"targets": [f"re:a{j}" for j in range(600)]} for i in range(2)}},
            "at most 1000 patterns",
        ),
        ({"ignore": [f"re:x{i}" for i in range(1001)]}, "at most 1000 patterns"),
        ({"ignore": "lm_head"}, "ignore = 'lm_head'"),
        ({"ignore": ["re:(a+)+$"]}, "ignore = .*at most 5 repeats"),
        ({"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config"),
    ],
)
def test_groups_that_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parsed(config("pack-quantized", num_bits=4, **GROUP) | changes)


def test_rounded_outputs_are_refused() -> None:
    written = config("pack-quantized", num_bits=4, **GROUP)
    written["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    with pytest.raises(ModelError, match=r"group_0\.output_activations"):
        parsed(written)
