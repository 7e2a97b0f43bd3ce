"""adapter_config.json of PEFT: which modules a LoRA changes, with which rank and scale.

The meaning is that of the peft library (Mangrulkar et al. 2022) for LoRA (Hu et al. 2022) and rank-stabilised LoRA
(Kalajdzievski 2023). What peft offers beyond those changes the forward pass, or what the base weights are, and is
refused by name; so is a field that is not known here, unless it is null, false or empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom.adapters.patterns import Budget, Pattern, PatternError
from tokenloom.errors import ModelError
from tokenloom.models.json_fields import Fields, is_number, read_json, shorten

CONFIG_FILE = "adapter_config.json"

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 256
"""Of one module."""

MAX_PATTERNS = 4096
"""Entries of rank_pattern and of alpha_pattern."""

_MAX_ALPHA = 1e6
_MAX_LAYERS = 1 << 16
_MAX_LISTS = 64
_ALL_LINEAR = "all-linear"

# These say how the adapter was trained, where it comes from, or what is checked otherwise.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # how the base layer stores its weight; A and B are never turned
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",  # a module name that peft always writes; megatron_config is what counts
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
_REFUSED = {
    "use_dora": "false (DoRA divides by the norms of the updated weights)",
    "lora_bias": "false",
    "modules_to_save": "null (whole modules that replace those of the base model)",
    "target_parameters": "null (use target_modules)",
    "trainable_token_indices": "null (rows that replace those of the embedding)",
    "alora_invocation_tokens": "null (activated LoRA changes a part of each text only)",
    "megatron_config": "null",
    "layer_replication": "null (it changes the layers of the base model)",
    "ensure_weight_tying": "false (name the head in target_modules: its tensors are in the file)",
}
# With these the base weights are changed before training: the tensors mean nothing over the original ones.
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
_KEEPS_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class Selection:
    """Modules by a pattern over the whole name; without one by name, or by what follows a dot of it."""

    names: frozenset[str] = frozenset()
    pattern: Pattern | None = None

    def matches(self, module: str, budget: Budget) -> bool:
        """Raises `PatternError`."""
        if self.pattern is not None:
            return self.pattern.matches(module, budget)
        return any(end in self.names for end in _ends(module))


@dataclass(frozen=True, slots=True, eq=False)
class LoraConfig:
    """What adapter_config.json says. Modules are named as in the model of transformers.

    `target` None: all linears but the head. `layers`: those of a module whose name gives a layer behind one of
    `layer_lists` (any list of modules if that is empty); it restricts modules that were named by their ends only.
    The methods raise `ModelError` for patterns that take too long.
    """

    base_model_name: str | None
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_patterns: tuple[tuple[Pattern, int], ...]
    alpha_patterns: tuple[tuple[Pattern, float], ...]
    target: Selection | None
    excluded: Selection
    layers: frozenset[int] | None
    layer_lists: tuple[str, ...]
    fields: Fields
    budget: Budget

    def is_target(self, module: str, *, is_inner_linear: bool) -> bool:
        """Whether peft puts an adapter on `module`; `is_inner_linear`: a linear, and not the head."""
        if self._selects(self.excluded, "exclude_modules", module):
            return False
        if self.target is None:
            return is_inner_linear
        if not self._selects(self.target, "target_modules", module):
            return False
        if self.layers is None or module in self.target.names:
            return True
        return _layer_of(module, self.layer_lists) in self.layers

    def rank_of(self, module: str) -> int:
        """The rank of a module: the first pattern that matches, else `rank`."""
        try:
            return next((r for pattern, r in self.rank_patterns if self._fits(pattern, module)), self.rank)
        except PatternError as error:
            self.fields.refuse("rank_pattern", f"patterns that are fast to match: {error}")

    def scale_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) where the ranks are stabilised."""
        try:
            alpha = next((a for pattern, a in self.alpha_patterns if self._fits(pattern, module)), self.alpha)
        except PatternError as error:
            self.fields.refuse("alpha_pattern", f"patterns that are fast to match: {error}")
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def _selects(self, selection: Selection, field: str, module: str) -> bool:
        try:
            return selection.matches(module, self.budget)
        except PatternError as error:
            self.fields.refuse(field, f"patterns that are fast to match: {error}")

    def _fits(self, pattern: Pattern, module: str) -> bool:
        return pattern.matches_end(module, self.budget)


def read_lora_config(path: Path) -> LoraConfig:
    """Read adapter_config.json. Raises `ModelError` that names the field."""
    written = Fields(read_json(path, MAX_CONFIG_BYTES), CONFIG_FILE)
    if written.data.get("peft_type") != "LORA":
        written.refuse("peft_type", "'LORA'")
    for name, value in written.data.items():
        if name in _REFUSED and not _is_off(value):
            written.refuse(name, _REFUSED[name])
        if name not in _READ | _NEUTRAL and not _is_off(value):
            raise ModelError(
                f"{CONFIG_FILE}: {shorten(name)} = {shorten(value)}",
                "the fields of LoRA; what this one changes is not known, so it must be null, false or empty",
            )
    if written.data.get("bias", "none") not in ("none", None):
        written.refuse("bias", "'none' (trained biases are not served)")
    _check_init(written)
    budget = Budget()
    target = _target(written, budget)
    layers = _layers(written)
    if isinstance(written.data.get("target_modules"), str) and layers is not None:
        written.refuse("layers_to_transform", "null where target_modules is a string (as in peft)")
    lists = _layer_lists(written)
    if lists and layers is None:
        written.refuse("layers_pattern", "null where layers_to_transform is (as in peft)")
    return LoraConfig(
        base_model_name=_base_name(written),
        rank=written.integer("r", 1, MAX_RANK, default=8),
        alpha=written.number("lora_alpha", -_MAX_ALPHA, _MAX_ALPHA, default=8),
        is_rank_stabilised=written.flag("use_rslora", False),
        rank_patterns=tuple((p, int(r)) for p, r in _patterns(written, "rank_pattern", _is_rank, budget)),
        alpha_patterns=tuple(
            (p, float(a)) for p, a in _patterns(written, "alpha_pattern", _is_alpha, budget)
        ),
        target=target,
        excluded=_selection(written, "exclude_modules", budget),
        layers=layers,
        layer_lists=lists,
        fields=written,
        budget=budget,
    )


def _base_name(written: Fields) -> str | None:
    name = written.data.get("base_model_name_or_path")
    if name is None or name == "":
        return None
    # JSON can escape half a character, which no file and no database takes.
    if not isinstance(name, str) or len(name) > 4096 or any("\ud800" <= sign <= "\udfff" for sign in name):
        written.refuse("base_model_name_or_path", "a name of up to 4096 characters, or null")
    return name


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _check_init(written: Fields) -> None:
    init = written.data.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return
    kind = init.lower() if isinstance(init, str) else ""
    if kind.startswith(_CHANGES_THE_BASE):
        written.refuse(
            "init_lora_weights",
            "an adapter over the original base weights; this start of training changes them (peft can"
            " convert all but loftq to plain LoRA: save_pretrained with path_initial_model_for_weight_conversion)",
        )
    if kind not in _KEEPS_THE_BASE:
        written.refuse("init_lora_weights", "true, false, " + ", ".join(_KEEPS_THE_BASE))


def _target(written: Fields, budget: Budget) -> Selection | None:
    value = written.data.get("target_modules")
    if isinstance(value, str) and value.lower() == _ALL_LINEAR:
        return None
    if _is_off(value):
        written.refuse("target_modules", "a list of modules, a pattern, or 'all-linear'")
    return _selection(written, "target_modules", budget)


def _selection(written: Fields, name: str, budget: Budget) -> Selection:
    value = written.data.get(name)
    if isinstance(value, str) and value:
        return Selection(pattern=_pattern(written, name, value, budget))
    return Selection(frozenset(_names(written, name)))


def _names(written: Fields, name: str) -> tuple[str, ...]:
    value = written.data.get(name)
    names = [value] if isinstance(value, str) and value else value or []
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        written.refuse(name, "names of modules")
    return tuple(names)


def _layer_lists(written: Fields) -> tuple[str, ...]:
    names = _names(written, "layers_pattern")
    if len(names) > _MAX_LISTS or not all(name.replace(".", "").isidentifier() for name in names):
        written.refuse(
            "layers_pattern", f"up to {_MAX_LISTS} plain names of the list of layers, such as 'layers'"
        )
    return names


def _layers(written: Fields) -> frozenset[int] | None:
    value = written.data.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MAX_LAYERS for i in layers):
        written.refuse("layers_to_transform", f"layers from 0 to {_MAX_LAYERS - 1}")
    return frozenset(layers)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return is_number(value) and abs(value) <= _MAX_ALPHA


def _patterns(
    written: Fields, name: str, accepts: Callable[[Any], bool], budget: Budget
) -> Iterator[tuple[Pattern, Any]]:
    value = written.data.get(name)
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        written.refuse(name, f"an object of at most {MAX_PATTERNS} patterns")
    for key, number in value.items():
        if not accepts(number):
            limit = (
                f"ranks from 1 to {MAX_RANK}" if name == "rank_pattern" else f"numbers up to {_MAX_ALPHA:g}"
            )
            raise ModelError(f"{CONFIG_FILE}: {name}: {shorten(key)} = {shorten(number)}", limit)
        yield _pattern(written, name, key, budget), number


def _pattern(written: Fields, name: str, text: str, budget: Budget) -> Pattern:
    try:
        return Pattern(text, budget)
    except PatternError as error:
        written.refuse(name, f"patterns of modules that can be matched in bounded time; {error}")


def _ends(module: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield module
    for place, sign in enumerate(module):
        if sign == ".":
            yield module[place + 1 :]


def _layer_of(module: str, lists: tuple[str, ...]) -> int | None:
    """The first number in the name that something follows and that stands behind the first of `lists` that has
    one (behind any name but the first, if there are no lists)."""
    parts = module.split(".")
    for wanted in lists or (None,):
        for place in range(2 if wanted is None else 1, len(parts) - 1):
            before = "." + ".".join(parts[:place])
            if parts[place].isdecimal() and (wanted is None or before.endswith(f".{wanted}")):
                return int(parts[place])
    return None
