"""Prometheus metrics of speculation: how much is guessed, how much of it comes true, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from tokenloom.api.adapter_metrics import OTHERS
from tokenloom.engine.plan import PlaceCounts, StepRecord

MAX_ADAPTERS: Final = 50
"""Adapters with a label of their own: those that were speculated for first, so that no counter ever falls."""

_PREFIX: Final = "tokenloom_spec_decode_"
_PLACE: Final = ["model_name", "proposer", "adapter", "position"]

_COUNTERS: Final = {
    "num_drafts": "Trees of guessed tokens that were verified.",
    "num_draft_tokens": "Guessed tokens that were verified.",
    "num_accepted_tokens": "Those of them that came true.",
}


class SpeculationMetrics:
    """Without proposers there are no series. `adapter_name` gives the name of a content id, None for an unknown one."""

    def __init__(self, registry: CollectorRegistry, adapter_name: Callable[[str], str | None]) -> None:
        self._adapter_name = adapter_name
        labels = ["model_name"]
        self._counters = {
            name: Counter(_PREFIX + name, text, labels, registry=registry) for name, text in _COUNTERS.items()
        }
        self._accepted_at = Counter(
            _PREFIX + "num_accepted_tokens_per_pos",
            "Guessed tokens that came true, by position in the tree, from 0.",
            [*labels, "position"],
            registry=registry,
        )
        self._steps = Counter(
            _PREFIX + "steps",
            "Steps in which sequences decoded, by whether anything was guessed for them.",
            [*labels, "speculated"],
            registry=registry,
        )
        self._tested = Counter(
            _PREFIX + "proposals_tested",
            "Times that a proposer suggested something behind a text that came true, by position from 0.",
            _PLACE,
            registry=registry,
        )
        self._true = Counter(
            _PREFIX + "proposals_accepted",
            "Times that what came true was among it.",
            _PLACE,
            registry=registry,
        )
        self._saved = Gauge(
            _PREFIX + "seconds_saved",
            "Seconds that plain steps would have taken more, by the fitted curve; below 0: less.",
            labels,
            registry=registry,
        )
        self._labels = {"": ""}
        self._bound: dict[str, Any] = {}
        self._positions: list[Any] = []
        self._places: dict[tuple[str, str, int], tuple[Any, Any]] = {}

    def on_step(self, model_name: str, record: StepRecord) -> None:
        """Take in what one step did."""
        done = record.speculation
        if done is None:
            return
        if not self._bound:
            self._bind(model_name)
        bound = self._bound
        bound["seconds_saved"].inc(done.seconds_saved)
        if done.skipped:
            bound["no"].inc()
        if not done.num_trees:
            return
        bound["yes"].inc()
        bound["num_drafts"].inc(done.num_trees)
        bound["num_draft_tokens"].inc(record.verify_rows)
        bound["num_accepted_tokens"].inc(record.num_accepted)
        for position, accepted in enumerate(done.accepted_by_depth):
            if position == len(self._positions):
                self._positions.append(self._accepted_at.labels(model_name, position))
            self._positions[position].inc(accepted)
        for place in done.places:
            self._count(model_name, place)

    def _bind(self, model_name: str) -> None:
        self._bound = {name: counter.labels(model_name) for name, counter in self._counters.items()}
        self._bound |= {word: self._steps.labels(model_name, word) for word in ("yes", "no")}
        self._bound["seconds_saved"] = self._saved.labels(model_name)

    def _count(self, model_name: str, place: PlaceCounts) -> None:
        adapter = self._label(place.adapter)
        key = (place.proposer, adapter, place.depth - 1)
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = (
                self._tested.labels(model_name, *key),
                self._true.labels(model_name, *key),
            )
        found[0].inc(place.tested)
        found[1].inc(place.accepted)

    def _label(self, content_id: str) -> str:
        """The label of an adapter; the same name stays, whatever content it is given later."""
        label = self._labels.get(content_id)
        if label is None:
            name = self._adapter_name(content_id)
            if name is None:
                return OTHERS
            own = set(self._labels.values()) - {"", OTHERS}
            label = name if name in own or len(own) < MAX_ADAPTERS else OTHERS
            self._labels[content_id] = label
        return label
