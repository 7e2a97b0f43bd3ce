"""8-bit floats: linears in E4M3 or E5M2 with scales, as vLLM, transformers and llm-compressor write them.

```
weight            float8 [N, K]
weight_scale      one number, or [N, 1] (one a row), or [N / rows, K / columns] rounded up (one a block)
weight_scale_inv  another name of it; a factor all the same
```
A weight is the float8 times its scale, one fp32 product. No kernel here multiplies float8, so a linear is unpacked
to these values in float32. What a file says of activations (input_scale, activation_scale) is not read: they are not
rounded to float8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization.packed_parts import FLOATS, Shape, check_matrix, finite_scales
from tokenloom.quantization.weights import Float32, num_groups, row_blocks

FLOAT8: Final[Mapping[str, Any]] = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

_ONE_OF: Final = ("weight_scale", "weight_scale_inv")
_UNREAD: Final = ("input_scale", "activation_scale", "output_scale")


def widen(values: NDArray[Any], dtype: Any = ml_dtypes.bfloat16) -> NDArray[Any]:
    """`values` of a float8 type as `dtype`, bfloat16 or wider, which holds them all exactly."""
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(dtype)
    return table[values.view(np.uint8)]


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """`block` is (outputs, inputs) that share a scale; 0 for all of them. See `LinearFormat`."""

    block: tuple[int, int] = (0, 0)

    main: ClassVar[str] = "weight"
    parts: ClassVar[tuple[str, ...]] = ("weight",)
    optional_parts: ClassVar[tuple[str, ...]] = (*_ONE_OF, *_UNREAD, "weight_zero_point")
    order_part: ClassVar[str | None] = None
    form: ClassVar[tuple[str, int]] = ("float32", 0)

    def dtypes(self, part: str) -> tuple[str, ...]:
        if part == "weight":
            return tuple(FLOAT8)
        return FLOATS if part in _ONE_OF else ()

    def shape(self, name: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        check_matrix(name, found, "weight")
        num_rows, depth = found["weight"]
        part = _scale_part(name, found)
        wanted = self._scale_shape((num_rows, depth))
        given = found[part]
        # One number stands in any number of dimensions, one a row also in one.
        if given != wanted and not (
            wanted[1] == 1 and np.prod(given, dtype=int) == wanted[0] and len(given) < 2
        ):
            raise ModelError(f"{name}.{part} of shape {list(given)}", f"{list(wanted)}")
        return num_rows, depth

    def unpack(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> Float32:
        weight = tensors["weight"]
        part = _scale_part(name, tensors)
        if "weight_zero_point" in tensors and tensors["weight_zero_point"].astype(np.float32).any():
            raise ModelError(f"{name}.weight_zero_point that is not 0", "floats around 0")
        num_rows, depth = weight.shape
        scales = finite_scales(tensors[part], name, part).reshape(self._scale_shape(weight.shape))
        height, width = self.block[0] or num_rows, self.block[1] or depth
        out = np.empty(weight.shape, np.float32)
        for rows in row_blocks(weight.shape):
            index = np.arange(rows.start, min(rows.stop, num_rows)) // height
            factors = scales[index]
            if factors.shape[1] > 1:
                factors = np.repeat(factors, width, axis=1)[:, :depth]
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(widen(weight[rows], np.float32), factors, out=out[rows])
            if not np.isfinite(out[rows]).all():
                raise ModelError(f"{name}.weight with a value that is not finite", "finite weights")
        return out

    def input_order(self, name: str, groups: NDArray[Any]) -> None:
        return None

    def _scale_shape(self, shape: Shape) -> tuple[int, int]:
        num_rows, depth = shape
        return num_groups(num_rows, self.block[0] or num_rows), num_groups(depth, self.block[1] or depth)


def _scale_part(name: str, parts: Mapping[str, Any]) -> str:
    present = [part for part in _ONE_OF if part in parts]
    if len(present) != 1:
        found = (
            " and ".join(f"{name}.{part}" for part in present) or f"{name}.weight in float8 without its scale"
        )
        raise ModelError(found, f"one of {name}.{', '.join(_ONE_OF)}")
    return present[0]
