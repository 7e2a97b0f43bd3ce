"""What blocks of GGUF become: exactly the values of the `gguf` package, or as near to them as is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.gguf_fixtures import decode, encode
from tokenloom.errors import ModelError, UnsupportedFeature
from tokenloom.gguf.types import TYPES
from tokenloom.quantization.gguf_blocks import GROUP, BlockMatrix, check_available

BLOCKS = [kind for kind in TYPES.values() if not kind.is_plain]
# Root mean square of the error, relative to that of the values. The numbers of docs/quantization.md.
INT8_LOSS = 0.012
INT4_LOSS = {"Q4_0": 0.0, "Q4_1": 0.075, "Q4_K": 0.085}


def matrix(name: str, shape: tuple[int, int] = (24, 1024)) -> BlockMatrix:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    kind = next(kind for kind in BLOCKS if kind.name == name)
    return BlockMatrix(encode(values, name, rng), kind, "x.weight")


def loss(found: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(np.sqrt(((found - values) ** 2).mean() / (values**2).mean()))


@pytest.mark.parametrize("name", [kind.name for kind in BLOCKS])
def test_values_are_those_of_the_package(name: str) -> None:
    blocks = matrix(name)
    values = decode(blocks.data, name)
    assert blocks.shape == values.shape == (24, 1024)
    assert (blocks.dequantize() == values).all()
    assert (blocks[5:9] == values[5:9]).all()
    out = np.empty_like(values)
    assert blocks.dequantize(out) is out


@pytest.mark.parametrize("name", [kind.name for kind in BLOCKS])
def test_int8_is_near(name: str) -> None:
    blocks = matrix(name)
    found = loss(blocks.int8().dequantize(), blocks.dequantize())
    assert 0 < found < INT8_LOSS


@pytest.mark.parametrize("name", INT4_LOSS)
def test_int4_is_near_and_q4_0_is_exact(name: str) -> None:
    blocks = matrix(name)
    packed = blocks.int4()
    assert blocks.has_four_bits and packed.group == GROUP
    if name == "Q4_0":
        assert (packed.dequantize() == blocks.dequantize()).all()
        assert (packed.zeros == 8).all()
    assert loss(packed.dequantize(), blocks.dequantize()) <= INT4_LOSS[name]
    assert loss(blocks.int4(64).dequantize(), blocks.dequantize()) < 0.15


def test_only_types_of_four_bits_say_so() -> None:
    assert {kind.name for kind in BLOCKS if matrix(kind.name).has_four_bits} == set(INT4_LOSS)


@pytest.mark.parametrize("name", [kind.name for kind in BLOCKS])
@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scales_that_are_not_finite(name: str, scale: float) -> None:
    blocks = matrix(name)
    at = blocks.kind.block_bytes - 2 if name == "Q6_K" else 0
    blocks.data[3, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    for convert in (blocks.int8, *([blocks.int4] if blocks.has_four_bits else [])):
        with pytest.raises(ModelError, match=r"x\.weight"):
            convert()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_available()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedFeature, match=r"tokenloom\[gguf\]"):
        check_available()
