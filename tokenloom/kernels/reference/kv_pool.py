"""The KV pool as one run of bytes, read and written through a strided view.

```
frame 0                                  frame 1
| page 0 | page 1 | ... | page P-1 | gap | page P | ...          P = pages_per_frame
page = [layers, 2 (K, V), kv_heads, 16 slots, head_dim] of the KV dtype
```
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.program import KVGeometry
from tokenloom.kernels.reference.rounding import bfloat16_bits, from_bfloat16_bits

Float32 = NDArray[np.float32]
Indices = NDArray[np.intp]

KVDtype = Literal["float32", "bfloat16"]

_LARGEST = np.finfo(np.float32).max


class KVPool:
    """`num_frames` frames of `frame_bytes` bytes, zeroed, with `pages_per_frame` pages each.

    The zeros matter: slots that nobody has written are multiplied by probabilities that are exactly zero,
    which gives zero only if what they hold is finite. `store` keeps them so. An owner that lends a frame to
    another class of pages must zero it when it comes back. Raises ValueError if the pages do not fit the
    frame.
    """

    def __init__(
        self, geometry: KVGeometry, dtype: str, *, num_frames: int, frame_bytes: int, pages_per_frame: int
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise UnsupportedFeature(f"KV dtype {dtype}", "the reference backend has float32 and bfloat16")
        self.dtype = dtype
        self.geometry = geometry
        self.pages_per_frame = pages_per_frame
        self.num_pages = num_frames * pages_per_frame
        item = np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)
        page_bytes = geometry.page_elements(PAGE_SIZE) * item.itemsize
        if page_bytes * pages_per_frame > frame_bytes or frame_bytes % item.itemsize:
            raise ValueError(
                f"{pages_per_frame} pages of {page_bytes} bytes do not fit a frame of {frame_bytes} bytes"
            )
        self._bytes = np.zeros(num_frames * frame_bytes, np.uint8)
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, PAGE_SIZE, geometry.head_dim)
        inner = np.zeros(shape, item).strides
        self._pages: NDArray[Any] = np.ndarray(
            (num_frames, pages_per_frame, *shape), item, self._bytes, 0, (frame_bytes, page_bytes, *inner)
        )
        # [frames, pages, layers, slots, 2, heads, dim]: with the slot beside the page, rows are stored by one
        # indexed assignment.
        self._slots = self._pages.transpose(0, 1, 2, 5, 3, 4, 6)
        self._sides = np.arange(2)[None, :, None, None]
        self._heads = np.arange(geometry.num_kv_heads)[None, None, :, None]

    def copy_pages(self, copies: NDArray[np.int32]) -> None:
        """Copy pages, int32 [C, 2] (source, destination); all sources are read before any is overwritten."""
        if len(copies):
            frames, pages = self.locate(copies)
            self._pages[frames[:, 1], pages[:, 1]] = self._pages[frames[:, 0], pages[:, 0]]

    def move_slots(self, moves: NDArray[np.int64]) -> None:
        """Copy slots, int64 [C, 2] (source, destination), one move after the other."""
        origins: dict[int, int] = {}
        for source, destination in moves.tolist():
            origins[destination] = origins.get(source, source)
        destinations, sources = np.array([*origins], np.int64), np.array([*origins.values()], np.int64)
        frames, pages = self.locate(destinations // PAGE_SIZE)
        from_frames, from_pages = self.locate(sources // PAGE_SIZE)
        held = self._slots[from_frames, from_pages, :, sources % PAGE_SIZE]
        self._slots[frames, pages, :, destinations % PAGE_SIZE] = held

    def clear_pages(self, page_ids: NDArray[np.int32]) -> None:
        """Zero pages."""
        frames, pages = self.locate(page_ids)
        self._pages[frames, pages] = 0

    def locate(self, page_ids: NDArray[Any]) -> tuple[Indices, Indices]:
        """Frame and index in the frame of page ids of any shape."""
        frames, pages = np.divmod(page_ids.astype(np.intp), self.pages_per_frame)
        return frames, pages

    def store(self, layer: int, frames: Indices, pages: Indices, offsets: Indices, values: Float32) -> None:
        """Write K and V of R rows, fp32 [R, 2, heads, dim], rounded once; see `RopeStore` for values that are
        not finite."""
        if not np.isfinite(values).all():
            values = np.where(np.isnan(values), np.float32(0), np.clip(values, -_LARGEST, _LARGEST))
        stored = bfloat16_bits(values) if self.dtype == "bfloat16" else values
        self._slots[frames, pages, layer, offsets] = stored

    def gather(self, layer: int, frames: Indices, pages: Indices) -> Float32:
        """K and V of whole pages in path order: indices [S, P] -> fp32 [S, 2, heads, P * 16, dim]."""
        view = self._pages[:, :, layer]
        found = view[frames[:, None, None], pages[:, None, None], self._sides, self._heads]
        values = from_bfloat16_bits(found) if self.dtype == "bfloat16" else found
        count, _, heads, num_pages, _, dim = values.shape
        return values.reshape(count, 2, heads, num_pages * PAGE_SIZE, dim)

    def gather_slots(self, layer: int, frames: Indices, pages: Indices, offsets: Indices) -> Float32:
        """K and V of single slots: indices [R] -> fp32 [R, 2, heads, dim]."""
        found = self._slots[frames, pages, layer, offsets]
        return from_bfloat16_bits(found) if self.dtype == "bfloat16" else found
