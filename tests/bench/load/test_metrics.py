"""Figures of records written by hand, against numbers worked out by hand and against numpy."""

from __future__ import annotations

import json
from array import array
from typing import Any

import numpy as np
import pytest

from tokenloom.bench.load.metrics import Distribution, peak_concurrency, summarize, trimmed
from tokenloom.bench.load.objectives import meets, parse_goodput
from tokenloom.bench.load.records import Record
from tokenloom.bench.load.report import counts_table, details, error_table, latency_table
from tokenloom.bench.load.runner import Run
from tokenloom.errors import InvalidParameter


def record(number: int, due: float, times: list[float], tokens: int | None = None, **more: Any) -> Record:
    """A request that was due and sent at `due` and whose chunks came at `times`."""
    fields = {
        "wanted_input": 10,
        "wanted_output": tokens or len(times),
        "arrival": due,
        "due": due,
        "sent": due,
        "first": times[0],
        "last": times[-1],
        "ended": times[-1],
        "gaps": array("d", np.diff(times).tolist()),
        "input_tokens": 10,
        "output_tokens": tokens or len(times),
    }
    return Record(number=number, **(fields | more))


def failed(number: int, due: float, error: str, detail: str = "") -> Record:
    return Record(
        number=number,
        wanted_input=10,
        wanted_output=4,
        arrival=due,
        due=due,
        sent=due,
        ended=due + 0.1,
        error=error,
        detail=detail,
    )


# Three requests: TTFT 100, 300, 200 ms; TPOT 50, 100, 20 ms (five tokens in two chunks); E2E 200, 500, 280 ms.
RECORDS = [
    record(0, 0.0, [0.1, 0.15, 0.2]),
    record(1, 1.0, [1.3, 1.4, 1.5], sent=1.004),
    record(2, 1.2, [1.4, 1.48], tokens=5, wanted_output=8, input_tokens=12),
    failed(3, 2.0, "HTTP 500", "a"),
    failed(4, 3.0, "HTTP 500", "b"),
    failed(5, 3.5, "connection refused"),
]
RUN = Run(records=RECORDS, seconds=4.0, cpu_share=0.25)


def test_figures_by_hand() -> None:
    report = summarize(RUN, objectives={"ttft": 0.2 + 1e-9, "tpot": 0.05 + 1e-9})
    plain = report.as_dict()
    assert (plain["completed"], plain["failed"]) == (3, 3)
    assert (plain["total_input_tokens"], plain["total_output_tokens"]) == (32, 11)
    assert plain["requested_output_tokens"] == 14
    assert plain["requests_with_fewer_output_tokens"] == 1
    assert plain["requests_with_other_input_tokens"] == 1
    assert plain["request_throughput"] == 3 / 4
    assert plain["output_throughput"] == 11 / 4
    assert plain["total_token_throughput"] == 43 / 4
    assert plain["mean_ttft_ms"] == pytest.approx(200)
    assert plain["median_tpot_ms"] == pytest.approx(50)
    assert plain["mean_tpot_ms"] == pytest.approx((50 + 100 + 20) / 3)
    assert plain["mean_itl_ms"] == pytest.approx((50 + 50 + 100 + 100 + 80) / 5)
    assert plain["p50_e2el_ms"] == pytest.approx(280)
    assert plain["tokens_per_chunk"] == pytest.approx(11 / 8)
    assert plain["mean_lag_ms"] == pytest.approx(4 / 6)
    assert plain["request_goodput"] == 2 / 4
    assert plain["goodput_attainment"] == 2 / 6
    assert plain["max_concurrent_requests"] == 2
    assert plain["errors"] == {
        "HTTP 500": {"count": 2, "example": "a"},
        "connection refused": {"count": 1, "example": ""},
    }
    json.dumps(plain, allow_nan=False)


def test_distributions_are_numpys() -> None:
    values = np.random.default_rng(0).lognormal(size=999)
    found = Distribution.of(values, [50, 90, 99, 99.9])
    assert (found.mean, found.median, found.std) == (values.mean(), np.median(values), values.std())
    for percentile, value in found.percentiles.items():
        assert value == np.percentile(values, percentile)


def test_a_late_generator_makes_its_figures_worse_and_is_warned_of() -> None:
    late = record(0, 0.0, [0.5, 0.6], sent=0.3)
    report = summarize(Run(records=[late], seconds=0.6, cpu_share=0.9))
    assert report.latencies["ttft"].mean == pytest.approx(0.5)
    assert report.lag.mean == pytest.approx(0.3)
    assert len(report.warnings) == 2
    assert "300.0 ms" in report.warnings[0]
    assert "90%" in report.warnings[1]
    assert summarize(RUN, percentiles=[95]).warnings == []


def test_one_token_has_no_time_per_token_and_meets_any_objective_for_it() -> None:
    one = record(0, 0.0, [0.1])
    report = summarize(Run(records=[one], seconds=0.1), objectives={"tpot": 0.001})
    assert report.as_dict()["mean_tpot_ms"] is None
    assert report.attainment == 1.0


def test_nothing_at_all() -> None:
    report = summarize(Run(), objectives={"ttft": 1.0})
    assert report.attainment == 0.0
    json.dumps(report.as_dict(), allow_nan=False)
    assert error_table(report) is None
    counts_table(report)
    latency_table(report)


def test_goodput_objectives() -> None:
    assert parse_goodput("ttft:200 tpot:50.5 e2el:4000") == {"ttft": 0.2, "tpot": 0.0505, "e2el": 4.0}
    assert parse_goodput("ttft:200,tpot:50.5") == {"ttft": 0.2, "tpot": 0.0505}
    assert parse_goodput("") == {}
    for wrong in (
        "ttft",
        "ttft:",
        "ttft:x",
        "itl:5",
        "ttft:0",
        "ttft:-1",
        "ttft:nan",
        "ttft:inf",
        "ttft:1 ttft:2",
    ):
        with pytest.raises(InvalidParameter, match="--goodput"):
            parse_goodput(wrong)
    assert meets(RECORDS[0], {"e2el": 0.2 + 1e-9})
    assert not meets(RECORDS[0], {"e2el": 0.19})
    assert not meets(RECORDS[3], {})


def test_trimming_leaves_the_middle() -> None:
    records = [record(i, float(i), [i + 0.1, i + 0.2]) for i in range(11)]
    assert [r.number for r in trimmed(records, 0.1)] == list(range(1, 10))
    report = summarize(Run(records=records, seconds=10.2), trim=0.1)
    assert report.completed == 9
    assert report.duration == pytest.approx(8.0)
    assert trimmed(records, 0.0) == records
    assert trimmed([], 0.2) == []


def test_peak_concurrency() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 1.7), (2.0, 4.0)]
    records = [record(i, start, [end]) for i, (start, end) in enumerate(spans)]
    assert peak_concurrency(records) == 3
    assert peak_concurrency([record(0, 0.0, [1.0]), record(1, 1.0, [2.0])]) == 1


def test_details_have_one_entry_for_each_request() -> None:
    found = details(RUN)
    assert {len(values) for values in found.values()} == {6}
    assert found["ttfts"][3] is None
    assert found["errors"][:4] == ["", "", "", "HTTP 500: a"]
    assert found["itls"][2] == pytest.approx([0.08])
    json.dumps(found, allow_nan=False)
