"""What runs a program: the native kernels, or the numpy reference."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import StepResult, TokenBatch
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.native import extension
from tokenloom.kernels.program import KVGeometry

Kernels = Literal["native", "reference"]
KVDtype = Literal["float32", "bfloat16", "int8"]


class Backend(Protocol):
    """A program with its weights and its KV pool, ready to run.

    `run` computes a step. It raises ValueError or `UnsupportedFeature` for a batch that names what does not
    exist (a page, a token, a row, an adapter), before anything is written, and `StepFailed` if computing
    failed. `numerics_id` names the arithmetic: equal ids mean equal bits for equal weights.
    """

    @property
    def numerics_id(self) -> str: ...

    def run(self, batch: TokenBatch) -> StepResult: ...

    def logits(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """fp32 [n, vocabulary]: logits of at most 64 rows of the last batch that are among its logit rows."""

    def close(self) -> None: ...


def choose_kernels(name: str) -> Kernels:
    """The backend that "auto", "native" or "reference" means on this machine. Raises `UnsupportedFeature` where
    the native one is asked for and was not built."""
    reason = extension.missing()
    if name == "native" and reason is not None:
        raise UnsupportedFeature("kernels native", reason)
    if name == "reference" or reason is not None:
        return "reference"
    return "native"


def kv_page_bytes(kv: KVGeometry, kv_dtype: str, kernels: str, page_size: int = 16) -> int:
    """Bytes of one KV page in the layout of a backend."""
    item = {"float32": 4, "bfloat16": 2, "int8": 1}[kv_dtype]
    if kernels == "reference":
        return kv.page_elements(page_size) * item
    # As native/src/kv.hpp: blocks begin at multiples of 64 bytes, V is padded to 16 dimensions.
    k_bytes = -(-item * kv.head_dim * page_size // 64) * 64
    v_bytes = item * (-(-kv.head_dim // 16) * 16) * page_size
    scale_bytes = 2 * 4 * page_size if kv_dtype == "int8" else 0
    return (k_bytes + v_bytes + scale_bytes) * kv.num_kv_heads * kv.num_layers
