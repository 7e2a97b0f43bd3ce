"""AWQ and GPTQ checkpoints of a tiny model, and their twins in floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.models.hf_fixtures import TINY, llama_tensors
from tests.quantization.packers import pack_awq, pack_gptq, random_parts
from tests.serving.helpers import BOS, EOS, VOCAB

GROUP = 32
CONFIG: dict[str, Any] = {
    **TINY,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float16",
}
METHODS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
    },
}
DOWN = "model.layers.1.mlp.down_proj"
V = "model.layers.0.self_attn.v_proj"
Q, K = V.replace("v_", "q_"), V.replace("v_", "k_")

Tensors = dict[str, np.ndarray]


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def make(
    method: str, keep: Callable[[str], bool] = lambda name: False
) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Tensors of a quantised checkpoint, of its float twin, and the config; `keep` names linears left alone."""
    packed: Tensors = {}
    plain: Tensors = {}
    for i, (name, tensor) in enumerate(llama_tensors(CONFIG, "float16").items()):
        if not is_linear(name) or keep(name):
            packed[name] = plain[name] = tensor
            continue
        version = 2 if method == "gptq_v2" else 1
        first = int(method == "gptq")
        q, scales, zeros = random_parts(*tensor.shape, GROUP, seed=i, zero_from=first)
        parts = (
            pack_awq(q, scales, zeros) if method == "awq" else pack_gptq(q, scales, zeros, version=version)
        )
        packed |= {f"{name.removesuffix('.weight')}.{part}": values for part, values in parts.items()}
        plain[name] = np.empty(tensor.shape, np.float32)
        for n, k in np.ndindex(*tensor.shape):
            step = np.float32(int(q[n, k]) - int(zeros[n, k // GROUP]))
            plain[name][n, k] = step * np.float32(scales[n, k // GROUP])
    return packed, plain, CONFIG | {"quantization_config": dict(METHODS[method])}
