"""Slots of the native KV pool: every byte of a key moves, in every format, and no other byte changes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenloom.engine.batch import PAGE_SIZE

_native = pytest.importorskip("tokenloom.kernels.native._native", reason="the native kernels were not built")

LAYERS, HEADS = 3, 2
NUM_SLOTS = 6 * PAGE_SIZE


class Pool:
    """Six pages of random K and V in every layer, two pages to a frame with a gap."""

    def __init__(self, kind: str, dim: int, isa: str, seed: int = 0) -> None:
        page_bytes = _native.kv_page_bytes(kind, LAYERS, HEADS, dim)
        self.pool = _native.KVPool(
            num_frames=3,
            frame_bytes=2 * page_bytes + 64,
            pages_per_frame=2,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=dim,
            format=kind,
        )
        rng = np.random.default_rng(seed)
        slots, none = np.arange(NUM_SLOTS), np.zeros((1, 0), np.float32)
        for layer in range(LAYERS):
            # Rows of every size, so that no two have the same int8 scale.
            size = np.exp(rng.uniform(-5, 5, (NUM_SLOTS, 1)))
            source = (rng.standard_normal((NUM_SLOTS, (1 + 2 * HEADS) * dim)) * size).astype(np.float32)
            query = np.zeros((NUM_SLOTS, dim), np.float32)
            zeros = np.zeros(NUM_SLOTS, np.int32)
            _native.kv_store(self.pool, layer, source, query, zeros, slots, none, none, isa=isa)

    def read(self) -> NDArray[np.uint32]:
        """Bits of K and V of all slots and layers, [slots, layers, 2, heads * dim]."""
        found = [
            [[side.ravel() for side in self.pool.read(layer, slot)] for layer in range(LAYERS)]
            for slot in range(NUM_SLOTS)
        ]
        return np.array(found, np.float32).view(np.uint32)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dim", [2, 6, 24, 64, 80])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_whole_keys_move_and_nothing_else(kind: str, dim: int, isa: str) -> None:
    pool = Pool(kind, dim, isa)
    expected = pool.read()
    rng = np.random.default_rng(dim)
    for _ in range(5):
        moves = rng.integers(0, NUM_SLOTS, (rng.integers(1, 30), 2))
        for source, destination in moves.tolist():
            expected[destination] = expected[source]
        pool.pool.move_slots(moves)
        assert (pool.read() == expected).all()


def test_slots_outside_the_pool_are_refused() -> None:
    pool = Pool("int8", 24, "")
    before = pool.read()
    for moves in ([[0, 1], [0, NUM_SLOTS]], [[0, 1], [-1, 3]]):
        with pytest.raises(ValueError, match="outside"):
            pool.pool.move_slots(np.array(moves, np.int64))
    assert (pool.read() == before).all()
