"""Prometheus metrics of adapters, made from one report at each scrape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenloom.serving.adapter_service import AdapterReport

MAX_LABELS: Final = 200
"""Adapters with a label of their own: those with most requests."""

OTHERS: Final = "_other"
"""The label of all others together; no adapter can be called so."""


class AdapterMetrics(Collector):
    """`reports` are those of the last scrape; without adapters there are no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reports: Sequence[AdapterReport] = ()
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known only to `collect`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The series of all adapters, idle ones too."""
        loaded = GaugeMetricFamily("tokenloom_adapters_loaded", "Adapters that requests can name.")
        resident = GaugeMetricFamily("tokenloom_adapters_resident", "Adapters in the memory for KV pages.")
        size = GaugeMetricFamily("tokenloom_adapters_resident_bytes", "What they take of it.")
        labels = ["adapter"]
        residency = GaugeMetricFamily(
            "tokenloom_adapter_resident_bytes",
            "What an adapter takes of the memory for KV pages.",
            labels=labels,
        )
        requests = CounterMetricFamily("tokenloom_adapter_requests", "Requests by adapter.", labels=labels)
        if not self.reports:
            return
        # Several names may stand for one content, which is there once.
        contents = {use.adapter: use.num_bytes for _, use in self.reports if use and use.num_bytes}
        loaded.add_metric([], len(self.reports))
        resident.add_metric([], len(contents))
        size.add_metric([], sum(contents.values()))
        ranked = sorted(self.reports, key=lambda report: (-report.served.num_requests, report.served.name))
        for served, use in ranked[:MAX_LABELS]:
            residency.add_metric([served.name], use.num_bytes if use else 0)
            requests.add_metric([served.name], served.num_requests)
        others = ranked[MAX_LABELS:]
        if others:
            residency.add_metric([OTHERS], sum(use.num_bytes for _, use in others if use))
            requests.add_metric([OTHERS], sum(served.num_requests for served, _ in others))
        yield from (loaded, resident, size, residency, requests)
