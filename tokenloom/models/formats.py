"""In which formats a model computes: the choice that "auto" stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenloom.kernels.backend import Kernels, KVDtype
from tokenloom.models.loading import ModelDescription, resolve_dtype


@dataclass(frozen=True, slots=True)
class Formats:
    """Which kernels compute, in which arithmetic, and how K and V are held."""

    kernels: Kernels
    dtype: Literal["float32", "bfloat16", "float16"]
    kv_dtype: KVDtype


def resolve_formats(
    described: ModelDescription,
    kernels: Kernels,
    *,
    dtype: str = "auto",
    kv_dtype: KVDtype | Literal["auto"] = "auto",
    weights: str = "auto",
) -> Formats:
    """The formats that are asked for, with each "auto" resolved for the model on these kernels. Raises
    `InvalidParameter` for an unknown `dtype`."""
    quantized = weights in ("int8", "int4") or described.is_quantized
    narrow = kernels == "native" and (quantized or described.config.dtype == "bfloat16")
    chosen = resolve_dtype(dtype, narrow=narrow)
    if kv_dtype != "auto":
        return Formats(kernels, chosen, kv_dtype)
    # K and V are rounded like the other activations.
    return Formats(kernels, chosen, "bfloat16" if chosen == "bfloat16" else "float32")
