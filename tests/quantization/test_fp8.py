"""8-bit floats against torch's, their scales against transformers' reading of them, and parts that are wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tokenloom.errors import ModelError
from tokenloom.quantization import weights as matrices
from tokenloom.quantization.fp8 import FLOAT8, Fp8Linear, widen
from tokenloom.quantization.linear_format import unpack_linear

torch = pytest.importorskip("torch", reason="the oracle of 8-bit floats")

CODES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("wide", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FLOAT8)
def test_every_number(name: str, wide: Any) -> None:
    found = widen(CODES.view(FLOAT8[name]), wide).astype(np.float32)
    wanted = torch.from_numpy(CODES).view(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def parts_of(
    rows: int, depth: int, scale_shape: tuple[int, ...], name: str = "float8_e4m3fn", seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, depth)) * 20).astype(FLOAT8[name])
    return {"weight": weight, "weight_scale_inv": rng.uniform(0.001, 0.1, scale_shape).astype(np.float32)}


@pytest.mark.parametrize("block_elements", [1, 1000, 1 << 22])
@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize(
    ("rows", "depth", "block", "scale_shape"),
    [
        (256, 384, (128, 128), (2, 3)),
        (200, 300, (128, 128), (2, 3)),
        (40, 96, (16, 64), (3, 2)),
        (40, 96, (0, 0), ()),
        (40, 96, (0, 0), (1,)),
        (40, 96, (0, 0), (1, 1)),
    ],
)
def test_scales_as_transformers_reads_them(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    depth: int,
    block: tuple[int, int],
    scale_shape: tuple[int, ...],
    name: str,
    block_elements: int,
) -> None:
    monkeypatch.setattr(matrices, "BLOCK_ELEMENTS", block_elements)
    integration = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="the oracle")
    parts = parts_of(rows, depth, scale_shape, name)
    found = unpack_linear(Fp8Linear(block), "x", parts)
    weight = torch.from_numpy(parts["weight"].view(np.uint8)).view(getattr(torch, name))
    scale = torch.from_numpy(np.atleast_1d(parts["weight_scale_inv"]))
    wanted = integration._dequantize_fp8_weight(
        weight, scale, list(block) if block[0] else None, torch.float32
    )
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert (found == wanted.numpy()).all()


@pytest.mark.parametrize("scale_shape", [(40, 1), (40,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_scale_for_each_row(scale_shape: tuple[int, ...], dtype: Any) -> None:
    parts = parts_of(40, 96, scale_shape)
    parts = {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"].astype(dtype)}
    parts["input_scale"] = np.full(1, np.nan, np.float32)
    found = unpack_linear(Fp8Linear((1, 0)), "x", parts)
    scales = parts["weight_scale"].astype(np.float32).reshape(40, 1)
    assert (found == parts["weight"].astype(np.float32) * scales).all()


def nan_weight(parts: dict[str, np.ndarray]) -> None:
    parts["weight"].view(np.uint8)[17, 3] = 0x7F


def other_scale(**changes: Any) -> Any:
    return lambda parts: parts.update(
        weight_scale_inv=np.ones(changes["shape"], changes.get("dtype", np.float32))
    )


BAD = [
    (nan_weight, r"weight with a value that is not finite"),
    (
        lambda parts: parts["weight_scale_inv"].fill(np.nan),
        r"weight_scale_inv with a value that is not finite",
    ),
    (lambda parts: parts["weight_scale_inv"].fill(3e38), r"weight with a value that is not finite"),
    (lambda parts: parts.pop("weight_scale_inv"), r"weight in float8 without its scale"),
    (
        lambda parts: parts.update(weight_scale=np.ones((2, 3), np.float32)),
        r"weight_scale and .*weight_scale_inv",
    ),
    (other_scale(shape=(3, 2)), r"weight_scale_inv of shape \[3, 2\]; supported: \[2, 3\]"),
    (other_scale(shape=()), r"weight_scale_inv of shape \[\]"),
    (other_scale(shape=(6,)), r"weight_scale_inv of shape \[6\]"),
    (other_scale(shape=(2, 3), dtype=np.int32), r"weight_scale_inv of dtype int32"),
    (lambda parts: parts.update(weight=parts["weight"].view(np.int8)), r"weight of dtype int8"),
    (lambda parts: parts.update(weight=parts["weight"][0]), r"weight of shape \[300\]"),
    (
        lambda parts: parts.update(weight_zero_point=np.ones(1, np.float32)),
        r"weight_zero_point that is not 0",
    ),
]


@pytest.mark.parametrize(("bend", "named"), BAD)
def test_bad_parts_are_named(bend: Any, named: str) -> None:
    parts = parts_of(200, 300, (2, 3))
    bend(parts)
    with pytest.raises(ModelError, match=r"x\.proj\." + named):
        unpack_linear(Fp8Linear((128, 128)), "x.proj", parts)
