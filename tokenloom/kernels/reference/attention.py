"""Attention of a ragged batch, planned once per step and run once per layer.

The keys of a row are counted along its own path and cut into splits of 128. All products are batches of
[tile, head_dim] @ [head_dim, 128] and [tile, 128] @ [128, head_dim], where a tile holds the query heads that
share a KV head, of one query row or of several neighbours. The shape of a product is thus a property of the
model, and a row's bits do not depend on the batch, on chunks or on pages.

Rows are worked on in groups: the single rows of many sequences together, the rows of one prompt chunk
together. A group walks over ranges of splits and merges them in order. A split that a row does not see adds
exact zeros and scales by exactly one, so it does not matter how many splits the others of its group have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE, TokenBatch
from tokenloom.kernels.program import SPLIT, Attention
from tokenloom.kernels.reference.gemm import padded
from tokenloom.kernels.reference.kv_pool import Indices, KVPool

Float32 = NDArray[np.float32]

_TILE_UNIT = 4
_PAGES_PER_SPLIT = SPLIT // PAGE_SIZE
_SCORES_PER_RANGE = 1 << 18
_KEYS_PER_RANGE = 1 << 19
"""A range's scores (1 MiB) and its gathered keys and values (2 MiB) should stay in the caches; they bound the
memory of a long context, too."""

_MAX_SINGLE_ROWS = 32
_BLOCK_ROWS = 128
_WORTH_A_GROUP = 4
"""Row-splits of masked work that cost about as much as the calls of one more group."""

_LOWEST = np.float32(-3.0e38)
_INFINITY = np.float32(np.inf)


@dataclass(frozen=True, slots=True, order=True)
class HeadShape:
    """Query heads per KV head, padded into tiles of `rows` = `per_tile` query rows x `group_rows` heads."""

    num_kv_heads: int
    group: int
    head_dim: int

    @property
    def rows(self) -> int:
        return padded(self.group, _TILE_UNIT)

    @property
    def per_tile(self) -> int:
        return _TILE_UNIT // self.group if self.group in (1, 2, 4) else 1

    @property
    def group_rows(self) -> int:
        return self.rows // self.per_tile

    @classmethod
    def of(cls, op: Attention) -> HeadShape:
        return cls(op.num_kv_heads, op.num_heads // op.num_kv_heads, op.head_dim)


@dataclass(slots=True)
class TreeKeys:
    """Keys of a range that lie in scratch slots: `members` and `keys` say where, the rest what."""

    members: Indices
    keys: Indices
    frames: Indices
    pages: Indices
    offsets: Indices


@dataclass(slots=True)
class SplitRange:
    """Some consecutive splits of a group: the tiles from `first_tile` on, the pages [S, C * 8] of the splits,
    and fp32 `ceiling` (+inf where a query sees the key, -inf where not; broadcasts over scores
    [S, heads, tiles, C, rows, 128]), or None where all see all."""

    first_tile: int
    frames: Indices
    pages: Indices
    ceiling: Float32 | None
    tree: TreeKeys | None


@dataclass(slots=True)
class Group:
    """S sequences with n query rows each, as `rows` intp [S, n], in `num_tiles` tiles each."""

    rows: Indices
    num_tiles: int
    ranges: list[SplitRange]


@dataclass(slots=True)
class _Paths:
    """What the rows of a group attend to: `logical` intp [S, n], `tables` intp [S, P], and tree keys as
    parallel arrays (member, key, slot)."""

    logical: Indices
    tables: Indices
    tree: tuple[Indices, Indices, Indices] | None = None


class AttentionPlan:
    """The groups of one batch for layers of one `HeadShape` and window."""

    def __init__(self, batch: TokenBatch, shape: HeadShape, window: int | None, pool: KVPool) -> None:
        self._shape = shape
        self._window = window
        self._pool = pool
        self.groups: list[Group] = []
        """Independent of each other, the most work first."""
        starts = batch.starts.astype(np.intp)
        lengths = np.diff(starts)
        has_tree = bool((batch.parents >= 0).any())
        in_tree = np.zeros(len(lengths), bool)
        if has_tree:
            in_tree = np.add.reduceat((batch.parents >= 0).astype(np.intp), starts[:-1]) > 0
        logical = batch.logical.astype(np.intp)
        tables = batch.page_tables.astype(np.intp)
        single = np.flatnonzero((lengths == 1) & ~in_tree)
        if len(single):
            rows = starts[single]
            for members in _by_splits(logical[rows] // SPLIT + 1):
                self._add(
                    rows[members][:, None], _Paths(logical[rows[members]][:, None], tables[single[members]])
                )
        for s in np.flatnonzero((lengths > 1) & ~in_tree):
            for begin in range(starts[s], starts[s + 1], _BLOCK_ROWS):
                rows = np.arange(begin, min(begin + _BLOCK_ROWS, starts[s + 1]))[None]
                self._add(rows, _Paths(logical[rows], tables[s : s + 1]))
        if has_tree:
            self._add_trees(batch, in_tree, logical, tables)
        self.groups.reverse()

    def _add_trees(
        self, batch: TokenBatch, in_tree: NDArray[np.bool_], logical: Indices, tables: Indices
    ) -> None:
        """Each row of a tree is a sequence of its own: the committed pages, then its ancestors' slots by
        depth (SpecInfer's tree attention, Miao et al. 2024, with the keys gathered instead of masked)."""
        owners = np.repeat(np.arange(batch.num_segments), np.diff(batch.starts))
        rows = np.flatnonzero(in_tree[owners])
        for members in _by_splits(logical[rows] // SPLIT + 1):
            chosen = rows[members]
            found: list[tuple[int, int, int]] = []
            for member, row in enumerate(chosen.tolist()):
                node = row
                while node >= 0:
                    slot = int(batch.slots[node])
                    if slot >= 0:
                        found.append((member, int(logical[node]), slot))
                    node = int(batch.parents[node])
            member_ids, keys, slots = np.array(found, np.intp).reshape(-1, 3).T
            paths = _Paths(logical[chosen][:, None], tables[owners[chosen]], (member_ids, keys, slots))
            self._add(chosen[:, None], paths)

    def _add(self, rows: Indices, paths: _Paths) -> None:
        shape = self._shape
        count, num_queries = rows.shape
        num_tiles = -(-num_queries // shape.per_tile)
        # Padding takes the limit of the last query, so that it asks for no mask of its own.
        limits = np.repeat(paths.logical[:, -1:], num_tiles * shape.per_tile, axis=1)
        limits[:, :num_queries] = paths.logical
        limits = np.repeat(limits, shape.group_rows, axis=1).reshape(count, num_tiles, shape.rows)
        first, last = 0, int(paths.logical.max()) // SPLIT + 1
        if self._window is not None:
            first = max(int(paths.logical.min()) - self._window + 1, 0) // SPLIT
        ranges: list[SplitRange] = []
        while first < last:
            # The first query row of a chunk sees the fewest keys: tiles before the range are left out.
            tile = (
                int(np.searchsorted(paths.logical[0], first * SPLIT)) // shape.per_tile if count == 1 else 0
            )
            scores = count * shape.num_kv_heads * (num_tiles - tile) * shape.rows * SPLIT
            keys = count * shape.num_kv_heads * SPLIT * shape.head_dim * 2
            num_splits = min(max(min(_SCORES_PER_RANGE // scores, _KEYS_PER_RANGE // keys), 1), last - first)
            ranges.append(self._range(paths, limits, tile, first, first + num_splits))
            first += num_splits
        self.groups.append(Group(rows, num_tiles, ranges))

    def _range(self, paths: _Paths, limits: Indices, tile: int, first: int, end: int) -> SplitRange:
        table = np.zeros((len(paths.tables), (end - first) * _PAGES_PER_SPLIT), np.intp)
        found = paths.tables[:, first * _PAGES_PER_SPLIT : end * _PAGES_PER_SPLIT]
        table[:, : found.shape[1]] = found
        frames, pages = self._pool.locate(table)
        tree = self._tree_keys(paths, first, end) if paths.tree is not None else None
        return SplitRange(tile, frames, pages, self._ceiling(limits[:, tile:], first, end), tree)

    def _ceiling(self, limits: Indices, first: int, end: int) -> Float32 | None:
        window = self._window
        sees_end = int(limits.min()) >= end * SPLIT - 1
        sees_start = window is None or int(limits.max()) - window < first * SPLIT
        if sees_end and sees_start:
            return None
        # One row of limits serves a tile whose queries all see the same keys (single rows and their padding).
        same = bool((limits == limits[:, :, :1]).all())
        last = (limits[:, :, :1] if same else limits)[:, None, :, None, :, None]
        keys = np.arange(first * SPLIT, end * SPLIT).reshape(1, 1, 1, end - first, 1, SPLIT)
        seen = keys <= last
        if window is not None:
            seen &= keys > last - window
        return np.where(seen, _INFINITY, -_INFINITY)

    def _tree_keys(self, paths: _Paths, first: int, end: int) -> TreeKeys | None:
        if paths.tree is None:
            return None
        members, keys, slots = paths.tree
        inside = (keys >= first * SPLIT) & (keys < end * SPLIT)
        page_ids, offsets = np.divmod(slots[inside], PAGE_SIZE)
        frames, pages = self._pool.locate(page_ids)
        return TreeKeys(members[inside], keys[inside] - first * SPLIT, frames, pages, offsets)


def run_attention(op: Attention, group: Group, pool: KVPool, source: Float32, out: Float32) -> None:
    """`Attention` for the rows of one group: source fp32 [T', num_heads * head_dim], out likewise."""
    shape = HeadShape.of(op)
    count, num_queries = group.rows.shape
    tiles = (count, shape.num_kv_heads, group.num_tiles, shape.rows, shape.head_dim)
    heads = (count, num_queries, shape.num_kv_heads, shape.group, shape.head_dim)
    queries = np.zeros(tiles, np.float32)
    placed = _by_query(queries, shape)[:, :, :num_queries, : shape.group]
    rows = _row_index(group.rows)
    np.multiply(source[rows].reshape(heads).transpose(0, 2, 1, 3, 4), np.float32(op.scale), out=placed)
    result = _attend(op, group, pool, queries)
    placed = _by_query(result, shape)[:, :, :num_queries, : shape.group]
    out[rows] = placed.transpose(0, 2, 1, 3, 4).reshape(count * num_queries, -1)


def _attend(op: Attention, group: Group, pool: KVPool, queries: Float32) -> Float32:
    """Queries [S, H, tiles, rows, dim], scaled -> the weighted values in the same layout."""
    count, heads, _, _, dim = queries.shape
    best = total = weighted = np.zeros(0, np.float32)
    layer, cap = op.layer, None if op.softcap is None else np.float32(op.softcap)
    for part in group.ranges:
        stored = pool.gather(layer, part.frames, part.pages)
        if part.tree is not None:
            tree = part.tree
            found = pool.gather_slots(layer, tree.frames, tree.pages, tree.offsets)
            stored[tree.members, :, :, tree.keys] = found
        stored = stored.reshape(count, 2, heads, 1, -1, SPLIT, dim)
        keys, values = stored[:, 0], stored[:, 1]
        scores = np.matmul(queries[:, :, part.first_tile :, None], keys.swapaxes(-1, -2))
        if cap is not None:
            scores /= cap
            np.tanh(scores, out=scores)
            scores *= cap
        if part.ceiling is not None:
            # fmin and not an addition: a stale key may give NaN or infinity, which must not get through.
            np.fmin(scores, part.ceiling, out=scores)
        highest = np.maximum.reduce(scores, axis=-1)
        scores -= np.maximum(highest, _LOWEST)[..., None]
        np.exp(scores, out=scores)
        sums = np.add.reduce(scores, axis=-1)
        products = np.matmul(scores, values)
        first = 0
        if not len(best):
            best, total = highest[:, :, :, 0].copy(), sums[:, :, :, 0].copy()
            # Adding zero turns -0 into +0, as every later merge does.
            weighted = products[:, :, :, 0] + np.float32(0)
            first = 1
        t = part.first_tile
        for i in range(first, scores.shape[3]):
            _merge(
                best[:, :, t:], total[:, :, t:], weighted[:, :, t:],
                highest[:, :, :, i], sums[:, :, :, i], products[:, :, :, i],
            )  # fmt: skip
    weighted /= total[..., None]
    return weighted


def _merge(
    best: Float32, total: Float32, weighted: Float32, highest: Float32, sums: Float32, products: Float32
) -> None:
    """One split into the running state, in place; see `Attention` for the formula."""
    merged = np.maximum(best, highest)
    floor = np.maximum(merged, _LOWEST)
    keep, take = np.exp(best - floor), np.exp(highest - floor)
    total *= keep
    total += sums * take
    weighted *= keep[..., None]
    weighted += products * take[..., None]
    best[...] = merged


def _by_query(tiles: Float32, shape: HeadShape) -> Float32:
    """[S, H, tiles, rows, dim] seen as [S, H, queries, group_rows, dim]."""
    count, heads, num_tiles, _, dim = tiles.shape
    return tiles.reshape(count, heads, num_tiles * shape.per_tile, shape.group_rows, dim)


def _row_index(rows: Indices) -> Indices | slice:
    """A slice where the rows are neighbours (no copy on reading), else a flat index."""
    if len(rows) == 1:
        return slice(int(rows[0, 0]), int(rows[0, -1]) + 1)
    return rows.reshape(-1)


def _by_splits(num_splits: Indices) -> list[Indices]:
    """Cut sequences into groups of like length, at most `_MAX_SINGLE_ROWS` each.

    A shorter group joins the next longer one when the masked work costs less than its calls would.
    """
    order = np.argsort(num_splits, kind="stable")
    ordered = num_splits[order]
    groups: list[Indices] = []
    begin = 0
    for i in range(1, len(order) + 1):
        if i < len(order):
            waste = int((ordered[i] - ordered[begin:i]).sum())
            if waste <= _WORTH_A_GROUP and i - begin < _MAX_SINGLE_ROWS:
                continue
        groups.append(order[begin:i])
        begin = i
    return groups
