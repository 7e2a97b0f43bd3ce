"""Products with adapters against the oracle, for the ranks, widths and lengths of segments that Punica names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.harness import Numerics, Run, small_config
from tests.kernels.test_adapters import FRAME, Block, Float32, Host, hidden_rows, make_blocks, run
from tokenloom.kernels import spec
from tokenloom.kernels.adapter_image import PAGE_BYTES
from tokenloom.kernels.native import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason="the native kernels were not built")

CONFIG = small_config(hidden_size=768, num_layers=1, vocab_size=800, tie_word_embeddings=False)
RANKS = (1, 8, 16, 24, 32, 64, 96, 128, 256)
SEGMENTS: dict[str, list[tuple[int, int]]] = {
    "mixed": [(2, 17), (-1, 16), (8, 15), (5, 2), (7, 1), (2, 16), (0, 15), (1, 17), (6, 2), (3, 1), (4, 2)],
    "skewed": [(4, 300), *((i % len(RANKS), 1) for i in range(20))],
    "single rows": [(i % (len(RANKS) + 1) - 1, 1) for i in range(40)],
    "one": [(8, 200)],
    "none": [(-1, 17), (-1, 1)],
}
"""(slot, rows) of each segment; -1 is the base."""


def make_runs(segments: list[tuple[int, int]]) -> list[Run]:
    rng = np.random.default_rng(3)
    runs, page = [], 1
    for _, rows in segments:
        count = -(-rows // 16)
        runs.append(Run(rng.integers(0, 800, rows).tolist(), 0, rows, list(range(page, page + count))))
        page += count
    return runs


def logits_of(found: list[Any]) -> Float32:
    return np.stack([np.frombuffer(row, np.float32) for _, row in found])


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_every_segment_is_the_oracle(name: str, narrow: bool) -> None:
    """The head of a wide model: each row is that of the base and what `spec.shrink` and `spec.expand` add to it."""
    dtype = "bfloat16" if narrow else "float32"
    host = Host(Numerics("native", dtype, dtype), CONFIG)
    segments = SEGMENTS[name]
    runs, slots = make_runs(segments), [slot for slot, _ in segments]
    base = logits_of(run(host, runs, [-1] * len(runs)))
    blocks: dict[int, Block] = {}
    for slot in sorted({*slots} - {-1}):
        (blocks[slot],) = make_blocks(host.program, slot + 1, (RANKS[slot],), "lm_head")
        host.load(slot, [blocks[slot]])
    # Three pages of KV to a frame from the front, adapters from the back.
    assert (max(r.pages[-1] for r in runs) // 3 + 1) * FRAME <= (host.next_page + 1) * PAGE_BYTES
    found = logits_of(run(host, runs, slots))
    at = 0
    for (slot, rows), one in zip(segments, runs, strict=True):
        if slot < 0:
            assert (found[at : at + rows] == base[at : at + rows]).all()
        else:
            hidden = hidden_rows(host, list(one.tokens), narrow)
            for row in sorted({0, rows // 2, rows - 1}):
                block = blocks[slot]
                v = spec.shrink(hidden[row], block.a, block.scale, narrow=narrow)
                expected = base[at + row] + spec.expand(v, block.b)
                assert (found[at + row] == expected).all(), (slot, rows, row)
        at += rows
