"""An adapter as it lies in pages: made once, written to a file, and copied page by page into the frame pool.

```
page 0                                              page 1
| row of A | row of A | ... | panel of B | ... | gap | panel of B | ...        every vector begins at 64 bytes
```
A row of A has the inputs of one rank. A panel of B has [rank][32] numbers for 32 output columns of a product, or
[rank][16] for the gate's or the up's half of a paired one, in the order in which native products walk. No vector
crosses the end of a page, so that pages may lie anywhere. Ranks are not padded (S-LoRA, Sheng et al. 2023).
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.kernels.mapped_file import map_file, read_ahead
from tokenloom.kernels.program import Embed, Linear, Program

PAGE_BYTES: Final = 64 << 10
"""Least bytes of a page."""

MAX_RANK: Final = 256
"""Ranks that every page holds a panel of."""

_PANEL: Final = 32
_HALF: Final = 16
_ALIGN: Final = 64
_MAGIC: Final = b"tokenloom adapter image 2\n"
_DTYPES: Final[dict[str, Any]] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class LowRankBlock(Protocol):
    """y[begin:end] += scale * ((x @ a.T) @ b.T) of the product with `weight`; a [rank, inputs], b [end - begin,
    rank]."""

    @property
    def weight(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def a(self) -> NDArray[Any]: ...
    @property
    def b(self) -> NDArray[Any]: ...
    @property
    def scale(self) -> float: ...


class LowRankEmbedding(Protocol):
    """x += scale * b @ a[:, token]; a [rank, vocabulary], b [width, rank]."""

    @property
    def a(self) -> NDArray[Any]: ...
    @property
    def b(self) -> NDArray[Any]: ...
    @property
    def scale(self) -> float: ...


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Part of a block: panels [first, first + count) of the product with `weight`, of one `half` where these are
    pairs (else -1). `rank` rows of A, then `count` panels of B lie at the next offsets of `Layout`."""

    weight: str
    first: int
    count: int
    half: int
    rank: int
    inputs: int
    scale: float


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the vectors lie; offsets int64 count from the start of page 0. `embedding_rank` 0: none. `checksum` is
    the CRC-32 of all pages."""

    dtype: str
    page_bytes: int
    num_pages: int
    pieces: list[Piece]
    a: bytes
    b: bytes
    embedding_rank: int = 0
    embedding_shape: tuple[int, int] = (0, 0)
    embedding_scale: float = 0.0
    embedding_a: bytes = b""
    embedding_b: bytes = b""
    checksum: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class AdapterImage:
    """`pages` uint8 [num_pages, page_bytes]; `is_mapped`: a view of a file that was opened."""

    layout: Layout
    pages: NDArray[np.uint8]
    is_mapped: bool = False

    @property
    def num_bytes(self) -> int:
        return self.layout.num_pages * self.layout.page_bytes

    def is_sound(self) -> bool:
        """Whether the pages are what was written. Reads them all."""
        return zlib.crc32(self.pages.data) == self.layout.checksum

    def will_need(self, first: int, count: int) -> None:
        """Have the system read these pages of the file ahead, without waiting for it."""
        if self.is_mapped:
            read_ahead(self.pages[first : first + count])

    def save(self, path: Path) -> None:
        """Write the image to `path`, all or nothing. Raises OSError."""
        head = msgspec.msgpack.encode(self.layout)
        start = -(-(len(_MAGIC) + 8 + len(head)) // 4096) * 4096
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + len(head).to_bytes(8, "little") + head)
                file.write(b"\0" * (start - file.tell()))
                file.write(self.pages.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def open(cls, path: Path) -> AdapterImage:
        """Map the image at `path`. Raises `ModelError` for a file that is not one, or damaged."""
        try:
            with open(path, "rb") as file:
                found = file.read(len(_MAGIC) + 8)
                length = int.from_bytes(found[len(_MAGIC) :], "little")
                size = os.fstat(file.fileno()).st_size
                if not found.startswith(_MAGIC) or length > size:
                    raise ValueError("no adapter image")
                layout = msgspec.msgpack.decode(file.read(length), type=Layout)
                start = -(-(len(_MAGIC) + 8 + length) // 4096) * 4096
                count = layout.num_pages * layout.page_bytes
                if layout.num_pages < 0 or layout.page_bytes < 1 or start + count != size:
                    raise ValueError(f"{size} bytes instead of {start + count}")
            # Nobody makes images shorter: they are replaced as a whole.
            pages = map_file(path)[start:].reshape(layout.num_pages, layout.page_bytes)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise ModelError(f"{path}: {error}", "an adapter image as it was written") from None
        return cls(layout, pages, is_mapped=True)


def page_bytes_for(program: Program, dtype: str) -> int:
    """Bytes of adapter pages for arithmetic in `dtype` (bfloat16; float32 for all others): the least power of two
    from `PAGE_BYTES` in which each vector of an adapter of rank up to `MAX_RANK` fits."""
    shapes = {spec.name: spec.shape for spec in program.weights}
    longest = max(shapes[name][1] for name, _ in program.products())
    longest = max(
        longest, MAX_RANK * _PANEL, *(shapes[o.weight][1] for o in program.ops if isinstance(o, Embed))
    )
    page_bytes = PAGE_BYTES
    while page_bytes < longest * np.dtype(_DTYPES[image_dtype(dtype)]).itemsize:
        page_bytes *= 2
    return page_bytes


def image_dtype(dtype: str) -> str:
    """The type of images for arithmetic in `dtype`."""
    return dtype if dtype == "bfloat16" else "float32"


def make_image(
    program: Program,
    blocks: Sequence[LowRankBlock],
    embedding: LowRankEmbedding | None,
    dtype: str,
    *,
    page_bytes: int,
) -> AdapterImage:
    """Lay out an adapter for arithmetic in `dtype` (float32 or bfloat16; numbers are rounded to it) in pages of
    `page_bytes`, as `page_bytes_for` gives them.

    Raises `ModelError` for numbers that the type does not hold, and for a vector that does not fit a page.
    """
    paired = dict(program.products())
    shapes = {spec.name: spec.shape for spec in program.weights}
    order = {name: i for i, name in enumerate(paired)}
    pieces: list[Piece] = []
    vectors: list[NDArray[Any]] = []  # [count, ...] equal vectors, A and B of each piece in turn
    for block in sorted(blocks, key=lambda block: (order[block.weight], block.begin)):
        a, b = _rounded(block.a, dtype, block.weight), _rounded(block.b, dtype, block.weight)
        for half, first, panels in _panels(b.T, block.begin, shapes[block.weight][0], paired[block.weight]):
            pieces.append(
                Piece(block.weight, first, len(panels), half, len(a), a.shape[1], float(block.scale))
            )
            vectors += [a, panels.reshape(len(panels), -1)]
    tokens: list[NDArray[Any]] = []
    if embedding is not None:
        tokens = [_rounded(part, dtype, "embedding").T for part in (embedding.a, embedding.b)]
    item = np.dtype(_DTYPES[dtype]).itemsize
    longest = max((v.shape[1] * item for v in (*vectors, *tokens)), default=_ALIGN)
    if longest > page_bytes:
        raise ModelError(f"an adapter with a vector of {longest} bytes", f"pages of {page_bytes} bytes")
    placed = _Placer(page_bytes)
    offsets = [placed.put(v) for v in vectors]
    chunks, rows = _token_chunks(tokens, page_bytes)
    token_offsets = [placed.put(chunk[None]) for chunk in chunks]
    row_offsets = [placed.put(rows)] if len(rows) else []
    data = placed.pages([*vectors, *(c[None] for c in chunks), *([rows] if len(rows) else [])])
    layout = Layout(
        dtype=dtype,
        page_bytes=page_bytes,
        num_pages=placed.num_pages,
        pieces=pieces,
        a=_joined(offsets[::2]),
        b=_joined(offsets[1::2]),
        embedding_rank=0 if embedding is None else len(embedding.a),
        embedding_shape=(0, 0) if embedding is None else (embedding.a.shape[1], len(embedding.b)),
        embedding_scale=0.0 if embedding is None else float(embedding.scale),
        embedding_a=_joined(token_offsets),
        embedding_b=_joined(row_offsets),
        checksum=zlib.crc32(data.data),
    )
    return AdapterImage(layout, data)


def product_numbers(program: Program) -> dict[str, int]:
    """The number of each product that an adapter can update, by its weight: that of its op, and behind them the
    head."""
    numbers = {op.weight: i for i, op in enumerate(program.ops) if isinstance(op, Linear)}
    return numbers | {program.head.weight: len(program.ops)}


def _rounded(values: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] = np.asarray(values).astype(_DTYPES[dtype])
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise ModelError(f"an adapter of {name} with numbers that {dtype} does not hold", "finite numbers")
    return narrow


def _panels(
    rows: NDArray[Any], begin: int, columns: int, paired: bool
) -> list[tuple[int, int, NDArray[Any]]]:
    """(half, first panel, [panels, rank, 32 or 16]) of the rows [rank, n] of columns [begin, begin + n)."""
    if not paired:
        return [(-1, *_cut(rows, begin, _PANEL))]
    middle = columns // 2
    parts = []
    for half, low, high in ((0, 0, middle), (1, middle, columns)):
        start, end = max(begin, low), min(begin + rows.shape[1], high)
        if start < end:
            parts.append((half, *_cut(rows[:, start - begin : end - begin], start - low, _HALF)))
    return parts


def _cut(rows: NDArray[Any], begin: int, width: int) -> tuple[int, NDArray[Any]]:
    first, last = begin // width, -(-(begin + rows.shape[1]) // width)
    wide = np.zeros((len(rows), (last - first) * width), rows.dtype)
    wide[:, begin - first * width : begin - first * width + rows.shape[1]] = rows
    return first, wide.reshape(len(rows), last - first, width).transpose(1, 0, 2)


def _token_chunks(tokens: Sequence[NDArray[Any]], page_bytes: int) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """A of an embedding by token in runs that fill a page, and the rows of its B."""
    if not tokens:
        return [], np.zeros((0, 0), np.uint8)
    by_token, rows = tokens
    per_page = page_bytes // (by_token.shape[1] * by_token.dtype.itemsize)
    runs = [by_token[i : i + per_page].reshape(-1) for i in range(0, len(by_token), per_page)]
    return runs, rows


def _joined(offsets: Sequence[NDArray[np.int64]]) -> bytes:
    return np.concatenate([np.zeros(0, np.int64), *offsets]).tobytes()


class _Placer:
    """Gives each vector a place: in order, at multiples of 64 bytes, in the next page where it does not fit."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._end = 0
        self._offsets: list[NDArray[np.int64]] = []

    @property
    def num_pages(self) -> int:
        return -(-self._end // self._page_bytes)

    def put(self, vectors: NDArray[Any]) -> NDArray[np.int64]:
        """Offsets of equal vectors [count, length]."""
        size = -(-vectors.shape[1] * vectors.dtype.itemsize // _ALIGN) * _ALIGN
        per_page = self._page_bytes // size
        used = self._end % self._page_bytes
        first = (self._page_bytes - used) // size if used else 0
        index = np.arange(len(vectors), dtype=np.int64)
        base = -(-self._end // self._page_bytes) * self._page_bytes
        late = index - first
        offsets: NDArray[np.int64] = np.where(
            late < 0,
            self._end + index * size,
            base + late // per_page * self._page_bytes + late % per_page * size,
        )
        if len(offsets):
            self._end = int(offsets[-1]) + size
        self._offsets.append(offsets)
        return offsets

    def pages(self, vectors: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
        """The bytes of all pages, `vectors` where `put` placed them."""
        data = np.zeros(self.num_pages * self._page_bytes, np.uint8)
        for offsets, values in zip(self._offsets, vectors, strict=True):
            raw = np.ascontiguousarray(values).view(np.uint8)
            # Runs of neighbours are one copy; between neighbours there is only the padding of each.
            size = -(-raw.shape[1] // _ALIGN) * _ALIGN
            breaks = np.flatnonzero(np.diff(offsets) != size) + 1
            for run in np.split(np.arange(len(offsets)), breaks):
                start = int(offsets[run[0]])
                block = data[start : start + len(run) * size].reshape(len(run), size)
                block[:, : raw.shape[1]] = raw[run[0] : run[-1] + 1]
        return data.reshape(-1, self._page_bytes)


def read_blocks(image: AdapterImage) -> list[tuple[Piece, NDArray[Any], NDArray[Any]]]:
    """Each piece with its A [rank, inputs and padding] and its panels [count, rank, 32 or 16], in float32."""
    a, b = _offsets(image.layout.a), _offsets(image.layout.b)
    found = []
    for piece in image.layout.pieces:
        rows, a = np.split(a, [piece.rank])
        panels, b = np.split(b, [piece.count])
        width = _PANEL if piece.half < 0 else _HALF
        found.append(
            (
                piece,
                _gather(image, rows, piece.inputs),
                _gather(image, panels, piece.rank * width).reshape(piece.count, piece.rank, width),
            )
        )
    return found


def read_embedding(image: AdapterImage) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """A by token [vocabulary, rank] and B by rank [rank, width] of the embedding, in float32; None without one."""
    layout = image.layout
    rank = layout.embedding_rank
    if not rank:
        return None
    per_page = layout.page_bytes // (rank * np.dtype(_DTYPES[layout.dtype]).itemsize)
    chunks = _offsets(layout.embedding_a)
    tokens, width = layout.embedding_shape
    parts = [
        _gather(image, chunks[i : i + 1], min(per_page, tokens - i * per_page) * rank)
        for i in range(len(chunks))
    ]
    by_token = np.concatenate([part.reshape(-1, rank) for part in parts])
    return by_token, _gather(image, _offsets(layout.embedding_b), width)


def _offsets(raw: bytes) -> NDArray[np.int64]:
    return np.frombuffer(raw, np.int64)


def _gather(image: AdapterImage, offsets: NDArray[np.int64], length: int) -> NDArray[np.float32]:
    """Vectors of `length` numbers at these offsets, [count, length]."""
    dtype = np.dtype(_DTYPES[image.layout.dtype])
    data, size = np.asarray(image.pages).reshape(-1), length * dtype.itemsize
    vectors = [data[at : at + size].view(dtype).astype(np.float32) for at in offsets.tolist()]
    stacked: NDArray[np.float32] = np.stack(vectors)
    return stacked
