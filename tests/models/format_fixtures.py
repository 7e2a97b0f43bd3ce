"""Tiny checkpoints in fp8, compressed-tensors and GPTQ's further formats, and their twins in floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tests.models.hf_fixtures import MIXTRAL, llama_tensors, mixtral_tensors
from tests.models.quantized_fixtures import CONFIG, Tensors, is_linear
from tests.quantization.compressed import compress, torch
from tests.quantization.packers import pack_gptq, random_parts

Linear = Callable[[np.ndarray, int], tuple[Tensors, np.ndarray]]
"""The parts of a linear by suffix, and its values in float32, from a weight and a seed."""

# More than one group of 32 in each row.
BASE = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "torch_dtype": "bfloat16"}
EXPERTS = BASE | MIXTRAL
Q32 = {"strategy": "group", "group_size": 32}


@dataclass(frozen=True)
class Stored:
    """`quantization_config`, what makes a linear, the form that is loaded, and the largest relative distance of a
    loaded weight from the twin's."""

    written: dict[str, Any]
    make: Linear
    form: str
    distance: float = 0.0


def compressed(layout: str, scale: str = "bfloat16", **weights: Any) -> Stored:
    def make(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        return compress(weight, layout, getattr(torch, scale), **weights)

    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    written = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    written |= {"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}
    channel = weights.get("strategy") == "channel" and weights.get("symmetric", True)
    form = {4: "int4", 8: "int8" if channel and weights.get("type") != "float" else "float"}[
        weights["num_bits"]
    ]
    return Stored(written, make, form, 2.0**-11 if form == "int4" and scale == "float32" else 0.0)


def fp8(block: tuple[int, int] | None, name: str = "weight_scale_inv") -> Stored:
    def make(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        rng = np.random.default_rng(seed)
        rows, depth = weight.shape
        height, width = block or (rows, depth)
        shape = (-(-rows // height), -(-depth // width)) if block else ()
        scale = rng.uniform(0.5, 2, shape).astype(np.float32) / 1000
        values = (weight / 0.002).astype(ml_dtypes.float8_e4m3fn)
        wide = np.broadcast_to(scale, shape or (1, 1)).repeat(height, 0).repeat(width, 1)[:rows, :depth]
        parts = {"weight": values, name: np.asarray(scale), "input_scale": np.ones(1, np.float32)}
        return parts, values.astype(np.float32) * wide

    written = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}
    return Stored(written | {"weight_block_size": list(block) if block else None}, make, "float")


def gptq(bits: int, *, group: int = 32, ordered: bool = False, symmetric: bool = False) -> Stored:
    def make(weight: np.ndarray, seed: int) -> tuple[Tensors, np.ndarray]:
        rows, depth = weight.shape
        rng = np.random.default_rng(seed)
        size = group if group > 0 else depth
        q, scales, zeros = random_parts(rows, depth, size, seed, zero_from=1)
        if bits == 8:
            q = rng.integers(0, 256, q.shape).astype(np.uint8)
            scales, zeros = (scales / 16).astype(np.float16), zeros + np.uint8(120)
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        groups = np.arange(depth) // size
        if ordered:
            # Linears that read one row were made together, and share its order.
            groups = np.random.default_rng(depth).permutation(groups)
        parts = pack_gptq(q, scales, zeros, bits=bits) | {"g_idx": groups.astype(np.int32)}
        return parts, (q.astype(np.float32) - zeros[:, groups]) * scales[:, groups].astype(np.float32)

    written = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": symmetric,
    }
    return Stored(written, make, "int4" if bits == 4 else "int8" if symmetric and group < 0 else "float")


STORED: dict[str, Stored] = {
    "packed 4": compressed("pack-quantized", num_bits=4, **Q32),
    "packed 4 float32": compressed("pack-quantized", "float32", num_bits=4, **Q32, symmetric=False),
    "packed 4 channel": compressed("pack-quantized", num_bits=4, strategy="channel"),
    "packed 8 group": compressed("pack-quantized", num_bits=8, **Q32),
    "packed 8 channel": compressed("pack-quantized", num_bits=8, strategy="channel"),
    "int8": compressed("int-quantized", num_bits=8, strategy="channel"),
    "float8": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8 block": fp8((16, 32)),
    "fp8 tensor": fp8(None),
    "fp8 vllm": fp8(None, "weight_scale"),
    "gptq ordered": gptq(4, ordered=True),
    "gptq row": gptq(4, group=-1),
    "gptq 8": gptq(8),
    "gptq 8 ordered": gptq(8, ordered=True),
    "gptq 8 row": gptq(8, group=-1, symmetric=True),
}


def make_stored(
    stored: Stored,
    keep: Callable[[str], bool] = lambda name: False,
    seed: int = 0,
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Tensors of the checkpoint, of its float twin, and the config; `keep` names linears left alone."""
    packed, plain = _stored(
        stored, llama_tensors(BASE, "bfloat16", seed), lambda n: is_linear(n) and not keep(n)
    )
    return packed, plain, BASE | {"quantization_config": dict(stored.written)}


def make_experts(
    stored: Stored, keep: Callable[[str], bool] = lambda name: False
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Likewise of a Mixtral, whose routers are left alone as its config says."""
    packed, plain = _stored(
        stored,
        mixtral_tensors(EXPERTS, "bfloat16"),
        lambda name: (is_linear(name) or ".experts." in name) and not keep(name),
    )
    written = dict(stored.written)
    field, router = (
        ("ignore", "re:.*gate$") if "ignore" in written else ("modules_to_not_convert", "moe.gate")
    )
    written[field] = ["lm_head", router]
    return packed, plain, EXPERTS | {"quantization_config": written}


def _stored(stored: Stored, tensors: Tensors, chosen: Callable[[str], bool]) -> tuple[Tensors, Tensors]:
    packed: Tensors = {}
    plain: Tensors = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if not chosen(name):
            packed[name] = plain[name] = tensor
            continue
        parts, values = stored.make(tensor.astype(np.float32), i)
        packed |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        plain[name] = values
    return packed, plain
