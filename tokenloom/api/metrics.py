"""Prometheus metrics. The model's name is the one label, besides the reason, stage, work, adapter, proposer or
position where a name says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tokenloom.api.adapter_metrics import AdapterMetrics
from tokenloom.api.speculation_metrics import SpeculationMetrics
from tokenloom.engine.plan import StepRecord
from tokenloom.engine.request import RequestTimings
from tokenloom.serving.client import EngineClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "tokenloom_"

_LATENCY = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.15,
    0.3,
    0.6,
    1.2,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
_TOKEN_LATENCY = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.4,
    0.8,
    1.6,
    3.2,
)
_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _LATENCY),
    "inter_token_latency_seconds": (
        "Between two tokens of one choice, as they leave the API.",
        _TOKEN_LATENCY,
    ),
    "request_time_per_output_token_seconds": ("Mean decode time per token of a choice.", _TOKEN_LATENCY),
    "e2e_request_latency_seconds": ("From the request's arrival to its end.", _LATENCY),
    "request_queue_time_seconds": ("From arrival in the engine to the first step.", _LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY),
    "iteration_tokens_total": ("Rows of one step.", _TOKENS),
}
_GAUGES = {
    "num_requests_running": "Sequences that run.",
    "num_requests_waiting": "Sequences that wait, preempted ones included.",
    "kv_cache_usage_perc": "Share of the KV pages in use, from 0 to 1.",
}
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "prompt_tokens": "Prompt tokens of requests that got a first token.",
    "prompt_tokens_cached": "Those of them that came from the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "adapters_fetched": "Adapters that were brought into the memory for KV pages.",
    "adapters_evicted": "Adapters that had to leave it.",
    "num_preemptions": "Sequences that gave up their pages to more urgent ones.",
    "engine_restarts": "Times that a dead engine was started again.",
}


class Metrics:
    """All metrics of one application, in a registry of their own.

    `bind` fixes the model's name; until then nothing is counted. `adapter_name` gives the name of a content id.
    """

    def __init__(self, adapter_name: Callable[[str], str | None] = lambda content_id: None) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name"]
        self._parents: dict[str, Any] = {}
        for name, (text, buckets) in _HISTOGRAMS.items():
            self._parents[name] = Histogram(
                PREFIX + name, text, labels, registry=self.registry, buckets=buckets
            )
        for name, text in _GAUGES.items():
            self._parents[name] = Gauge(PREFIX + name, text, labels, registry=self.registry)
        for name, text in _COUNTERS.items():
            self._parents[name] = Counter(PREFIX + name, text, labels, registry=self.registry)
        self._success = Counter(
            PREFIX + "request_success",
            "Choices that ended, by the reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._stages = Counter(
            PREFIX + "scheduler_stage_seconds",
            "Seconds of the step loop, by stage.",
            ["model_name", "stage"],
            registry=self.registry,
        )
        self._rows = Counter(
            PREFIX + "step_rows",
            "Rows of all steps, by work; those to verify are guessed tokens.",
            ["model_name", "work"],
            registry=self.registry,
        )
        self.adapters = AdapterMetrics(self.registry)
        self.speculation = SpeculationMetrics(self.registry, adapter_name)
        self._model_name = ""
        self._bound: dict[str, Any] = {}
        self._stage_counters: dict[str, Any] = {}
        self._row_counters: dict[str, Any] = {}
        self._num_restarts = 0

    def bind(self, model_name: str) -> None:
        """Count for this model from now on; the first name stays."""
        if self._model_name:
            return
        self._model_name = model_name
        self._bound = {name: parent.labels(model_name) for name, parent in self._parents.items()}
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)
        self._row_counters = {
            work: self._rows.labels(model_name, work) for work in ("prefill", "decode", "verify")
        }

    def observe(self, name: str, value: float) -> None:
        """Add `value` to a histogram."""
        if self._bound:
            self._bound[name].observe(value)

    def count(self, name: str, amount: int = 1) -> None:
        """Raise a counter."""
        if self._bound:
            self._bound[name].inc(amount)

    def count_finished(self, reason: str) -> None:
        """One more choice ended with `reason`, one of OpenAI's words or abort or error."""
        if self._bound:
            self._success.labels(self._model_name, reason).inc()

    def on_step(self, client: EngineClient, record: StepRecord) -> None:
        """Take in what one step did."""
        if not self._bound:
            self.bind(client.card.name)
        bound = self._bound
        bound["num_requests_running"].set(record.num_running)
        bound["num_requests_waiting"].set(record.num_waiting)
        bound["kv_cache_usage_perc"].set(record.pages_used / max(record.pages_total, 1))
        rows = {"prefill": record.prefill_rows, "decode": record.decode_rows, "verify": record.verify_rows}
        bound["iteration_tokens_total"].observe(sum(rows.values()))
        for work, count in rows.items():
            self._row_counters[work].inc(count)
        self.speculation.on_step(self._model_name, record)
        for name, amount in (
            ("prefix_cache_queries", record.prefix_queries),
            ("prefix_cache_hits", record.prefix_hits),
            ("num_preemptions", record.num_preemptions),
            ("adapters_fetched", record.adapters_fetched),
            ("adapters_evicted", record.adapters_evicted),
        ):
            if amount:
                bound[name].inc(amount)
        for stage, seconds in record.seconds.items():
            counter = self._stage_counters.get(stage)
            if counter is None:
                counter = self._stage_counters[stage] = self._stages.labels(self._model_name, stage)
            counter.inc(max(seconds, 0.0))

    def on_choice_end(self, timings: RequestTimings, num_tokens: int, *, first_choice: bool) -> None:
        """Observe the engine's own times of a choice; those of the prompt with its first choice only."""
        arrival, scheduled, first_token, finished = timings
        if first_choice and scheduled >= arrival >= 0:
            self.observe("request_queue_time_seconds", scheduled - arrival)
        if first_choice and first_token >= scheduled >= 0:
            self.observe("request_prefill_time_seconds", first_token - scheduled)
        if finished >= first_token >= 0:
            self.observe("request_decode_time_seconds", finished - first_token)
            if num_tokens > 1:
                self.observe(
                    "request_time_per_output_token_seconds", (finished - first_token) / (num_tokens - 1)
                )

    def render(self, client: EngineClient) -> bytes:
        """The text of /metrics."""
        if self._bound:
            restarts, self._num_restarts = client.num_restarts - self._num_restarts, client.num_restarts
            self._bound["engine_restarts"].inc(restarts)
        if self._bound and client.num_in_flight == 0:
            # The last step may have been before a cancel emptied the engine.
            for name in _GAUGES:
                self._bound[name].set(0)
        return generate_latest(self.registry)
