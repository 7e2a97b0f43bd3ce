"""Low-rank updates on numpy: what `program.Linear` says of rows with an adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenloom.kernels.adapter_image import AdapterImage, read_blocks, read_embedding
from tokenloom.kernels.program import Program
from tokenloom.kernels.reference.fingerprint import check_product, fixed_values
from tokenloom.kernels.reference.gemm import ROW_TILE, PackedLinear, padded

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Update:
    begin: int
    end: int
    a: PackedLinear
    b: PackedLinear
    scale: np.float32


@dataclass(frozen=True, slots=True)
class _Bound:
    products: dict[str, list[_Update]]
    embedding: tuple[Float32, Float32, np.float32] | None
    """A by token, B transposed, and the scale."""


class AdapterUpdates:
    """The adapters that are bound, by slot."""

    def __init__(self, program: Program) -> None:
        self._paired = dict(program.products())
        self._shapes = {spec.name: spec.shape for spec in program.weights}
        self._bound: dict[int, _Bound] = {}
        self._checked: set[tuple[int, int]] = set()

    def __contains__(self, slot: int) -> bool:
        return slot in self._bound

    def bind(self, slot: int, image: AdapterImage) -> None:
        """Take the adapter in. Raises ValueError if the slot is taken, `UnsupportedFeature` as
        `fingerprint.check_product`."""
        if slot in self._bound:
            raise ValueError(f"adapter slot {slot} is taken")
        products: dict[str, list[_Update]] = {}
        for piece, a, panels in read_blocks(image):
            columns = self._shapes[piece.weight][0]
            width = panels.shape[2]
            shift = 0 if piece.half < 0 else piece.half * (columns // 2)
            limit = columns if piece.half < 0 else columns // 2
            begin, end = piece.first * width, min((piece.first + piece.count) * width, limit)
            b = panels.transpose(0, 2, 1).reshape(-1, piece.rank)[: end - begin]
            depth = self._shapes[piece.weight][1]
            update = _Update(
                shift + begin,
                shift + end,
                self._packed(a[:, :depth]),
                self._packed(b),
                np.float32(piece.scale),
            )
            products.setdefault(piece.weight, []).append(update)
        embedding = read_embedding(image)
        if embedding is not None:
            by_token, rows = embedding
            scale = np.float32(image.layout.embedding_scale)
            self._bound[slot] = _Bound(products, (by_token, rows, scale))
        else:
            self._bound[slot] = _Bound(products, None)

    def unbind(self, slot: int) -> None:
        """Forget a slot; ValueError where nothing is bound."""
        if self._bound.pop(slot, None) is None:
            raise ValueError(f"adapter slot {slot} is empty")

    def add_products(self, weight: str, slots: Int32, source: Float32, y: Float32) -> None:
        """y [R, columns] += what the adapters of its rows make of `source` [R, inputs]; `slots` are theirs."""
        for slot in np.unique(slots).tolist():
            if slot < 0 or weight not in self._bound[slot].products:
                continue
            rows = np.flatnonzero(slots == slot)
            x = np.zeros((padded(len(rows), ROW_TILE), source.shape[1]), np.float32)
            x[: len(rows)] = source[rows]
            for update in self._bound[slot].products[weight]:
                v = np.zeros((len(x), update.a.padded_columns), np.float32)
                update.a.multiply(x, v)
                v *= update.scale
                delta = np.empty((len(x), update.b.padded_columns), np.float32)
                update.b.multiply(np.ascontiguousarray(v[:, : update.b.depth]), delta)
                y[rows, update.begin : update.end] += delta[: len(rows), : update.end - update.begin]

    def add_embeddings(self, slots: Int32, token_ids: Int32, x: Float32) -> None:
        """x [R, width] += the low-rank embeddings of its tokens, rank by rank."""
        for slot in np.unique(slots).tolist():
            if slot < 0:
                continue
            found = self._bound[slot].embedding
            if found is None:
                continue
            rows = np.flatnonzero(slots == slot)
            by_token, b, scale = found
            v = by_token[token_ids[rows]] * scale
            total = np.zeros((len(rows), x.shape[1]), np.float32)
            for j in range(len(b)):
                total += v[:, j, None] * b[j]
            x[rows] += total

    def _packed(self, weight: NDArray[np.float32]) -> PackedLinear:
        packed = PackedLinear(np.ascontiguousarray(weight, np.float32))
        for width in packed.tile_widths:
            if (packed.depth, width) not in self._checked:
                check_product(fixed_values(ROW_TILE, packed.depth), fixed_values(packed.depth, width))
                self._checked.add((packed.depth, width))
        return packed
