"""What a model family brings: the fields of config.json that are its own, and its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenloom.kernels.program import MAX_CHOSEN, MAX_EXPERTS, Program
from tokenloom.models.config import Activation, ExpertsConfig, ModelConfig
from tokenloom.models.json_fields import Fields

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}
MAX_LAYER_EXPERTS = 1 << 16
"""Experts of all layers together."""

Read = Callable[[Fields, ModelConfig], ModelConfig]
Build = Callable[[ModelConfig], Program]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face.

    `defaults` are values that transformers gives to absent fields where they differ from Llama's; a field that
    is null counts as written. `read` completes what the common fields gave, and refuses by name what the family
    does not offer. `partial_rotary`: `partial_rotary_factor` may be below 1. `rope_kinds` are its own names of
    rope types. `activation` is what `hidden_act` must be; None: `read` checks it. `default_theta`: the layers
    with a window have a RoPE table of their own, and these are the bases of the others and of theirs where the
    file does not say. `names` are its words for common fields.
    """

    model_type: str
    architecture: str
    build: Build
    read: Read
    defaults: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary: bool = False
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    activation: str | None = "silu"
    default_theta: tuple[float, float] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def sliding_layers(
    written: Fields, config: ModelConfig, default: Sequence[str] | None = None
) -> tuple[int | None, ...]:
    """The window of each layer: `layer_types` says which ones slide, without it `default`, without that all.

    Empty where nothing slides. Raises `ModelError`.
    """
    window = written.optional_integer("sliding_window", 1, 1 << 26)
    if window is None:
        return ()
    kinds = written.data.get("layer_types")
    if kinds is None:
        kinds = list(default or ["sliding_attention"] * config.num_layers)
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != config.num_layers or any(k not in known for k in kinds):
        written.refuse("layer_types", f"{config.num_layers} of full_attention and sliding_attention")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def read_activation(written: Fields, name: str, default: str) -> Activation:
    """The activation of an MLP without a gate, from the field `name`. Raises `ModelError`."""
    found = written.data.get(name, default)
    if not isinstance(found, str) or found not in _ACTIVATIONS:
        written.refuse(name, "one of " + ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[found]


def sliding_everywhere(written: Fields, config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer where transformers knows one for all and reads no `layer_types`; empty without one.

    Raises `ModelError`.
    """
    window = written.optional_integer("sliding_window", 1, 1 << 26)
    return () if window is None else (window,) * config.num_layers


def read_experts(
    written: Fields,
    config: ModelConfig,
    *,
    width: str,
    normalized: bool,
    dense_layers: frozenset[int] = frozenset(),
) -> ExpertsConfig:
    """The experts; `width` is the field of their size. Raises `ModelError`."""
    count = written.integer("num_experts", 1, min(MAX_EXPERTS, MAX_LAYER_EXPERTS // config.num_layers))
    return ExpertsConfig(
        count=count,
        top_k=written.integer("num_experts_per_tok", 1, min(count, MAX_CHOSEN)),
        width=written.integer(width, 1, 1 << 20),
        normalized=normalized,
        dense_layers=dense_layers,
    )
