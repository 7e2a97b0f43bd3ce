"""What must hold of a scheduler between two steps."""

from __future__ import annotations

from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.engine.scheduler import Scheduler
from tokenloom.engine.sequence import Sequence, State


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise AssertionError unless pages, rows and states are consistent."""
    running = scheduler.running
    scheduler.adapters.check_books(seq.request.adapter for seq in running if seq.request.adapter)
    _check_waiters(scheduler)
    scheduler.parked.check()
    scheduler.cache.check(seq.pages for seq in running)
    rows = [seq.row for seq in running]
    if len(set(rows)) != len(rows) or len(rows) + scheduler.table.num_free != len(scheduler.table.pages):
        raise AssertionError(f"rows {rows} are not one per running sequence")
    if scheduler.rows_promised != sum(len(seq.siblings) for seq in running):
        raise AssertionError("promised rows do not add up")
    for seq in running:
        _check_running(seq, scheduler.table.pages[seq.row, : len(seq.pages)].tolist())
    for seq in (*scheduler.waiting, *scheduler.parked):
        if seq.state is not State.WAITING or seq.pages or seq.row >= 0:
            raise AssertionError(f"a waiting sequence of {seq.request.request_id} holds pages or a row")
    live = {seq for sequences in scheduler.live.values() for seq in sequences}
    for seq in (*running, *scheduler.waiting, *scheduler.parked):
        if seq not in live:
            raise AssertionError(f"{seq.request.request_id} is not live but still scheduled")


def _check_waiters(scheduler: Scheduler) -> None:
    waiters: dict[str, int] = {}
    for seq in scheduler.waiting:
        waiters[seq.request.adapter] = waiters.get(seq.request.adapter, 0) + 1
    for adapter, found in scheduler.adapters.resident.items():
        if found.waiters != waiters.pop(adapter, 0):
            raise AssertionError(f"adapter {adapter} has {found.waiters} waiters")
    if waiters.keys() - {""}:
        raise AssertionError(f"sequences wait for pages without their adapters {sorted(waiters)}")


def _check_running(seq: Sequence, table: list[int]) -> None:
    """Positions are contiguous and KV is that of the committed tokens: invariants I2 to I4 of "Batch Speculative
    Decoding Done Right" (Zhang et al. 2025), I1 being about padding, of which there is none."""
    name = seq.request.request_id
    if seq.state is not State.RUNNING or table != seq.pages:
        raise AssertionError(f"{name}: page table {table} is not {seq.pages}")
    if not 0 <= seq.num_computed < len(seq.tokens):
        raise AssertionError(f"{name}: {seq.num_computed} of {len(seq.tokens)} computed")
    if seq.num_output and seq.num_stored > len(seq.tokens) - (seq.num_output > 1):
        raise AssertionError(f"{name}: KV is stored past the committed tokens")
    if seq.num_stored > len(seq.pages) * PAGE_SIZE:
        raise AssertionError(f"{name}: KV is stored past the last page")
