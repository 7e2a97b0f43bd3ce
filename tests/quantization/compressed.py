"""Linears compressed by the package compressed-tensors, which vLLM and llm-compressor read and write with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compressed-tensors needs torch")
pytest.importorskip("compressed_tensors", reason="the writer of the format is not installed")

from compressed_tensors.compressors.base import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

Parts = dict[str, np.ndarray]


def to_numpy(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return np.asarray(tensor.numpy())


def compress(
    weight: np.ndarray, layout: str, scale_dtype: Any = torch.float32, **fields: Any
) -> tuple[Parts, np.ndarray]:
    """The parts of a linear as the package stores `weight` float32 [N, K], and what it makes of them again."""
    args = QuantizationArgs(**fields)
    values = torch.from_numpy(weight)
    rows, depth = weight.shape
    height, width = {
        "tensor": (rows, depth),
        "channel": (1, depth),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or (1, 1)),
    }[str(args.strategy.value if hasattr(args.strategy, "value") else args.strategy)]
    down, across = -(-rows // height), -(-depth // width)
    padded = torch.zeros(down * height, across * width)
    padded[:rows, :depth] = values
    cells = padded.reshape(down, height, across, width)
    scale, zero = calculate_qparams(cells.amin((1, 3)), cells.amax((1, 3)), args)
    scale = scale.to(scale_dtype)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(dict(state), scheme)
    # In float32 as here: the package rounds to the type of the scales at the end.
    wide = {name: part.float() if name == "weight_scale" else part for name, part in stored.items()}
    back = compressor.decompress(wide, scheme)["weight"]
    return {name: to_numpy(part) for name, part in stored.items()}, to_numpy(back)
