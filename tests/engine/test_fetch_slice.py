from __future__ import annotations

import pytest

from tokenloom.engine.policies.fetch_slice import FetchSlice


def test_a_slice_takes_its_share_of_a_step() -> None:
    pace = FetchSlice(share=0.05)
    for _ in range(50):
        pace.stepped(0.040)
        pace.copied(2_000_000, 0.0005)
    assert pace.num_bytes == pytest.approx(0.05 * 0.040 * 4e9, rel=0.01)


def test_the_bounds_hold_whatever_was_measured() -> None:
    pace = FetchSlice(min_bytes=1000, max_bytes=5000)
    assert pace.num_bytes == 1000
    pace.copied(100, 0.0)
    pace.stepped(0.0)
    assert pace.num_bytes == 1000
    pace.stepped(1.0)
    pace.copied(10**9, 0.1)
    assert pace.num_bytes == 5000


def test_slow_disks_shrink_the_slice() -> None:
    pace = FetchSlice()
    pace.stepped(0.2)
    pace.copied(1 << 30, 0.25)
    fast = pace.num_bytes
    for _ in range(20):
        pace.copied(pace.num_bytes, pace.num_bytes / 50e6)
    assert pace.num_bytes == FetchSlice().min_bytes < fast
