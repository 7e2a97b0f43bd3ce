"""What runs a program: the native kernels, or the numpy reference."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import StepResult, TokenBatch
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.adapter_image import AdapterImage
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.backend import DTYPES
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

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Copy K and V of whole slots, int64 [C, 2] (source, destination; page * 16 + offset), one move after the
        other: a source may be what an earlier move left there. Raises ValueError before anything is copied."""

    def clear_kv_pages(self, pages: NDArray[np.int32]) -> None:
        """Zero KV pages of this model. Where other models, or adapters, lie in the same frames, a page is cleared when
        it is taken and again when it is given back: what it holds for one may be no finite keys for another. Raises
        ValueError before anything is written."""

    def write_pages(self, pages: NDArray[np.int32], page_bytes: int, data: NDArray[np.uint8]) -> None:
        """Copy adapter pages [n, page_bytes] into the pool."""

    def clear_pages(self, pages: NDArray[np.int32], page_bytes: int) -> None:
        """Make pages that held an adapter fit for K and V again."""

    def bind_adapter(self, slot: int, image: AdapterImage, pages: NDArray[np.int32]) -> None:
        """Rows of `slot` have this adapter from now on; `pages` hold its image."""

    def unbind_adapter(self, slot: int) -> None:
        """Forget a slot; its pages may be used for something else."""

    def close(self) -> None: ...


class Choice(NamedTuple):
    """What computes: the backend, its instruction set ("" for the reference), and why these."""

    kernels: Kernels
    isa: str
    reason: str


def choose_kernels(name: str, *, dtype: str = "auto", isa: str = "auto") -> Choice:
    """What "auto", "native" or "reference" means on this machine, for arithmetic in `dtype` and the
    instruction set `isa`. Raises `UnsupportedFeature` for what was asked for by name and is not there."""
    missing = extension.missing()
    if name == "native" and missing is not None:
        raise UnsupportedFeature("kernels native", missing)
    lacking = None
    if dtype not in ("auto", *DTYPES):
        lacking = f"the native kernels compute in {' or '.join(DTYPES)}"
    if name == "native" and lacking is not None:
        raise UnsupportedFeature(f"dtype {dtype}", f"{lacking}; kernels reference has it")
    reason = "asked for by name" if name == "reference" else missing or lacking
    if reason is not None:
        if isa != "auto":
            why = f"it is for the native kernels, and the numpy reference would compute ({reason})"
            raise UnsupportedFeature(f"isa {isa}", why)
        return Choice("reference", "", reason)
    usable = extension.isas()
    if isa == "auto":
        return Choice("native", usable[0], "the best that this processor has")
    if isa not in usable:
        raise UnsupportedFeature(f"isa {isa}", f"this build on this processor has {', '.join(usable)}")
    return Choice("native", isa, "asked for by name")


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
