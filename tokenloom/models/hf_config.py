"""Hugging Face config.json and generation_config.json, checked field by field.

Both spellings are read: transformers 4 (`rope_theta` beside `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters` with everything in it, `dtype`). Fields that a file leaves out take the values that
transformers gives them. What would change the result and is not offered is refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from tokenloom.errors import ModelError
from tokenloom.models.config import ModelConfig, RopeConfig, RopeKind
from tokenloom.models.family import Family
from tokenloom.models.json_fields import Fields, is_number, read_json, shorten
from tokenloom.models.registry import FAMILIES
from tokenloom.quantization.config import parse_quantization

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

# Far above every published model; they bound what a broken file can make anybody compute or allocate.
MAX_VOCAB = 1 << 24
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 14
MAX_HEAD_DIM = 1 << 10
MAX_CONTEXT = 1 << 26

_DTYPES = ("float32", "bfloat16", "float16")
_LAYER_KINDS = ("full_attention", "sliding_attention")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_MIN_FACTOR = 1e-6
_MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults as the authors wrote them to generation_config.json; None for the others.

    `do_sample` is kept as written. Like vLLM, `as_sampling` does not ask for it: many files leave it out
    whose temperature is meant.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def as_sampling(self) -> dict[str, float | int]:
        """What was written, by the names of `SamplingParams` (max_new_tokens is max_tokens there)."""
        names = {"max_new_tokens": "max_tokens"}
        written = {
            names.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if f.name != "do_sample"
        }
        return {name: value for name, value in written.items() if value is not None}


def read_config(directory: str | Path) -> ModelConfig:
    """The architecture in `directory`/config.json, with the end-of-text ids of generation_config.json if any.

    Raises `ModelError`, naming the field, for what is absent, malformed, out of bounds or not offered.
    """
    directory = Path(directory)
    config = parse_config(_read(directory, CONFIG_FILE, required=True))
    data = _read(directory, GENERATION_FILE, required=False)
    eos = Fields(data, GENERATION_FILE).token_ids("eos_token_id", config.vocab_size)
    return config if eos is None else replace(config, eos_token_ids=eos)


def read_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """The sampling defaults in `directory`/generation_config.json; all None without that file.

    Raises `ModelError` if the file is malformed or a value is out of its limits.
    """
    written = Fields(_read(Path(directory), GENERATION_FILE, required=False), GENERATION_FILE)
    do_sample = written.flag("do_sample", False) if written.data.get("do_sample") is not None else None
    return GenerationDefaults(
        do_sample=do_sample,
        temperature=written.optional_number("temperature", 0, 100),
        top_p=written.optional_number("top_p", 0, 1, above=True),
        top_k=written.optional_integer("top_k", -1, (1 << 31) - 1),
        min_p=written.optional_number("min_p", 0, 1),
        repetition_penalty=written.optional_number("repetition_penalty", 0.01, 100),
        max_new_tokens=written.optional_integer("max_new_tokens", 1, (1 << 31) - 1),
    )


def parse_config(data: Mapping[str, Any]) -> ModelConfig:
    """`data`, the object of a config.json, as a `ModelConfig`. Raises `ModelError` as `read_config` does."""
    family = _family(data)
    data = {**family.defaults, **data}
    data |= {name: data[theirs] for name, theirs in family.names.items() if theirs in data}
    written = Fields(data, CONFIG_FILE)
    if family.activation is not None and data.get("hidden_act", family.activation) != family.activation:
        written.refuse("hidden_act", repr(family.activation))
    hidden_size = written.integer("hidden_size", 1, MAX_WIDTH)
    num_heads = written.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = written.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        written.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = _head_dim(written, hidden_size, num_heads)
    if num_heads * head_dim > MAX_WIDTH:
        written.refuse("num_attention_heads", f"num_attention_heads * head_dim of at most {MAX_WIDTH}")
    context = written.integer("max_position_embeddings", 2, MAX_CONTEXT, default=2048)
    rope, local_rope = _ropes(data, head_dim, context, family)
    vocab_size = written.integer("vocab_size", 1, MAX_VOCAB)
    bos = written.token_ids("bos_token_id", vocab_size) or (None,)
    if len(bos) > 1:
        written.refuse("bos_token_id", "one token id")
    config = ModelConfig(
        family=family.model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=written.integer(
            "intermediate_size",
            1,
            MAX_WIDTH,
            default=4 * hidden_size if "intermediate_size" in family.names else None,
        ),
        num_layers=written.integer("num_hidden_layers", 1, MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context=_served_context(rope, context),
        rms_norm_eps=written.number("rms_norm_eps", 1e-20, 1, default=1e-6),
        rope=rope,
        local_rope=local_rope,
        tie_word_embeddings=written.flag("tie_word_embeddings", False),
        bos_token_id=bos[0],
        eos_token_ids=written.token_ids("eos_token_id", vocab_size) or (),
        dtype=_dtype(written),
        quantization=parse_quantization(data, CONFIG_FILE),
        matryoshka=_matryoshka(written, hidden_size),
    )
    return family.read(written, config)


def _matryoshka(written: Fields, hidden_size: int) -> tuple[int, ...] | None:
    """The lengths to which embeddings may be cut, as vLLM reads them."""
    lengths = written.data.get("matryoshka_dimensions")
    if lengths:
        if not isinstance(lengths, list) or not all(
            type(n) is int and 1 <= n <= hidden_size for n in lengths
        ):
            written.refuse("matryoshka_dimensions", f"a list of integers from 1 to {hidden_size}")
        return tuple(sorted(set(lengths)))
    return () if written.flag("is_matryoshka", False) else None


def _read(directory: Path, name: str, *, required: bool) -> dict[str, Any]:
    if not os.path.isdir(directory):
        raise ModelError(f"no directory {directory}", "a directory in the Hugging Face format")
    path = directory / name
    if not required and not os.path.exists(path):
        return {}
    if not os.path.exists(path):
        raise ModelError(f"{directory} without {name}", "a directory in the Hugging Face format")
    return read_json(path)


def _family(data: Mapping[str, Any]) -> Family:
    """The family; both `model_type` and, where present, `architectures` must say it."""
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    architectures, model_type = data.get("architectures"), data.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{CONFIG_FILE}: model_type = {shorten(model_type)}", supported)
    family = FAMILIES.get(model_type)
    if architectures is None and family is not None:
        return family
    if family is None or not isinstance(architectures, list) or family.architecture not in architectures:
        raise ModelError(
            f"architectures {shorten(architectures)} with model_type {shorten(model_type)}", supported
        )
    return family


def _ropes(
    data: Mapping[str, Any], head_dim: int, context: int, family: Family
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding, and that of layers with a window where the family tells them apart.

    transformers 5 has one object for each kind of layer; before, what scales belonged to the layers without a
    window, and `rope_local_base_freq` was the base of the others.
    """

    def read(data: Mapping[str, Any]) -> RopeConfig:
        return _rope(data, _rotary_dim(data, head_dim, family), context, family.rope_kinds)

    if family.default_theta is None:
        return read(data), None
    theta, local_theta = family.default_theta
    found = data.get("rope_parameters")
    if isinstance(found, dict) and not found.keys().isdisjoint(_LAYER_KINDS):
        kinds = [found.get(kind) for kind in _LAYER_KINDS]
        if any(not isinstance(kind, dict | None) for kind in kinds):
            Fields(data, CONFIG_FILE).refuse(
                "rope_parameters", "an object for each of " + ", ".join(_LAYER_KINDS)
            )
        both = [
            {"rope_parameters": kind or {}, "rope_theta": base}
            for kind, base in zip(kinds, (theta, local_theta), strict=True)
        ]
        return read(both[0]), read(both[1])
    local = Fields(data, CONFIG_FILE).number("rope_local_base_freq", 1, 1e15, default=local_theta, above=True)
    return read({"rope_theta": theta, **data}), read({"rope_theta": local})


def _rotary_dim(data: Mapping[str, Any], head_dim: int, family: Family) -> int:
    """How many leading dimensions of a head rotate. The factor stands beside the rope object or within."""
    _, inner = _rope_object(data)
    source = inner if inner.data.get("partial_rotary_factor") is not None else Fields(data, CONFIG_FILE)
    factor = source.number("partial_rotary_factor", 0, 1, default=1.0, above=True)
    rotary_dim = int(head_dim * factor)
    if not family.partial_rotary and rotary_dim != head_dim:
        source.refuse("partial_rotary_factor", "1 (every dimension of a head rotates)")
    if rotary_dim < 2 or rotary_dim % 2:
        source.refuse("partial_rotary_factor", f"a factor that leaves an even part of head_dim {head_dim}")
    return rotary_dim


def _head_dim(written: Fields, hidden_size: int, num_heads: int) -> int:
    head_dim = written.optional_integer("head_dim", 2, MAX_HEAD_DIM)
    if head_dim is None:
        if hidden_size % num_heads:
            written.refuse(
                "num_attention_heads", f"a divisor of hidden_size ({hidden_size}) where head_dim is absent"
            )
        head_dim = hidden_size // num_heads
        if not 2 <= head_dim <= MAX_HEAD_DIM:
            written.refuse(
                "num_attention_heads", f"a head_dim of 2 to {MAX_HEAD_DIM}, but this gives {head_dim}"
            )
    if head_dim % 2:
        raise ModelError(
            f"{CONFIG_FILE}: head_dim {head_dim}", "an even head_dim (dimensions rotate in pairs)"
        )
    return head_dim


def _dtype(written: Fields) -> Literal["float32", "bfloat16", "float16"]:
    name = "dtype" if written.data.get("dtype") is not None else "torch_dtype"
    value = written.data.get(name)
    if value is None:
        return "float32"
    if value not in _DTYPES:
        written.refuse(name, "one of " + ", ".join(_DTYPES))
    return cast(Literal["float32", "bfloat16", "float16"], value)


def _rope_object(data: Mapping[str, Any]) -> tuple[str, Fields]:
    """Name and fields of what describes the rotary embedding. As in transformers, a non-empty `rope_scaling`
    wins over `rope_parameters`."""
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    found = data.get(name)
    if found is None:
        found = {}
    if not isinstance(found, dict):
        Fields(data, CONFIG_FILE).refuse(name, "an object with rope_type")
    return name, Fields(found, CONFIG_FILE, prefix=name + ".")


def _rope(data: Mapping[str, Any], rotary_dim: int, context: int, kinds: Mapping[str, str]) -> RopeConfig:
    """The rotary embedding. A `rope_theta` inside of the rope object wins over the one beside it; `kinds` are
    other names of rope types."""
    name, inner = _rope_object(data)
    found = inner.data
    type_name = "rope_type" if "rope_type" in found else "type"
    kind = found.get(type_name, "default")
    kind = kinds.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in _ROPE_KINDS or any(isinstance(value, dict) for value in found.values()):
        raise ModelError(
            f"{CONFIG_FILE}: {name} = {shorten(found)}", "one rope_type of " + ", ".join(_ROPE_KINDS)
        )
    source = inner if found.get("rope_theta") is not None else Fields(data, CONFIG_FILE)
    theta = source.number("rope_theta", 1, 1e15, default=10000.0, above=True)
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    original = _original_context(data, inner, kind, context)
    factor = _factor(inner, kind, context, original)
    extra = _KIND_FIELDS[kind](inner, rotary_dim) if kind in _KIND_FIELDS else {}
    return RopeConfig(
        kind=cast(RopeKind, kind),
        theta=theta,
        rotary_dim=rotary_dim,
        factor=factor,
        original_context=original,
        **extra,
    )


def _original_context(data: Mapping[str, Any], inner: Fields, kind: str, context: int) -> int | None:
    """The length before stretching. transformers lets a field beside the rope object win over the one within,
    and takes max_position_embeddings where neither is given; for `dynamic` it knows only the latter."""
    if kind == "linear":
        return None
    if kind == "dynamic":
        return context
    name = "original_max_position_embeddings"
    outer = Fields(data, CONFIG_FILE).optional_integer(name, 2, MAX_CONTEXT)
    return outer if outer is not None else inner.integer(name, 2, MAX_CONTEXT, default=context)


def _factor(inner: Fields, kind: str, context: int, original: int | None) -> float:
    if kind in ("yarn", "longrope") and inner.data.get("factor") is None:
        assert original is not None  # every kind but linear has one
        if kind == "longrope":  # only the attention factor comes from it, which is 1 below 1
            return max(context / original, 1.0)
        if not 1 <= context / original <= _MAX_FACTOR:
            inner.refuse("factor", f"a number from 1 to {_MAX_FACTOR:g}")
        return context / original
    return inner.number("factor", 1, _MAX_FACTOR)


def _llama3_fields(inner: Fields, rotary_dim: int) -> dict[str, Any]:
    low = inner.number("low_freq_factor", _MIN_FACTOR, _MAX_FACTOR)
    high = inner.number("high_freq_factor", _MIN_FACTOR, _MAX_FACTOR)
    if high <= low:
        inner.refuse("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn_fields(inner: Fields, rotary_dim: int) -> dict[str, Any]:
    # transformers takes the default of beta_fast and beta_slow for 0 as well as for null.
    fast = inner.number("beta_fast", _MIN_FACTOR, _MAX_FACTOR) if inner.data.get("beta_fast") else 32.0
    slow = inner.number("beta_slow", _MIN_FACTOR, _MAX_FACTOR) if inner.data.get("beta_slow") else 1.0
    if fast < slow:
        inner.refuse("beta_fast", f"a number of at least beta_slow ({slow:g})")
    return {
        "beta_fast": fast,
        "beta_slow": slow,
        "attention_factor": inner.optional_number("attention_factor", _MIN_FACTOR, _MAX_FACTOR),
        "mscale": inner.optional_number("mscale", 0, _MAX_FACTOR),
        "mscale_all_dim": inner.optional_number("mscale_all_dim", 0, _MAX_FACTOR),
        "truncate": inner.flag("truncate", True),
    }


def _dynamic_fields(inner: Fields, rotary_dim: int) -> dict[str, Any]:
    if rotary_dim <= 2:
        raise ModelError(
            f"{CONFIG_FILE}: rope type 'dynamic' with {rotary_dim} rotating dimensions", "more than 2"
        )
    return {}


def _longrope_fields(inner: Fields, rotary_dim: int) -> dict[str, Any]:
    short = inner.data.get("short_factor")
    if (
        not isinstance(short, list)
        or len(short) != rotary_dim // 2
        or not all(is_number(value) and _MIN_FACTOR <= value <= _MAX_FACTOR for value in short)
    ):
        inner.refuse(
            "short_factor", f"a list of {rotary_dim // 2} numbers from {_MIN_FACTOR:g} to {_MAX_FACTOR:g}"
        )
    return {
        "short_factor": tuple(float(value) for value in short),
        "attention_factor": inner.optional_number("attention_factor", _MIN_FACTOR, _MAX_FACTOR),
    }


_KIND_FIELDS = {
    "llama3": _llama3_fields,
    "yarn": _yarn_fields,
    "dynamic": _dynamic_fields,
    "longrope": _longrope_fields,
}


def _served_context(rope: RopeConfig, context: int) -> int:
    """How many tokens can be served, from `context` = max_position_embeddings and the rope type.

    default, llama3: `context`. linear: `context` is the length before stretching (transformers asks authors
    to leave it alone), so times the factor. yarn: `context` where it differs from the original length (it
    then is the stretched one), else times the factor. dynamic, longrope: the original length, since their
    frequencies change with the length of the text beyond it.
    """
    served = context
    if rope.kind == "linear" or (rope.kind == "yarn" and context == rope.original_context):
        served = math.floor(context * rope.factor)
    elif rope.kind in ("dynamic", "longrope"):
        served = min(context, rope.original_context or context)
    if served > MAX_CONTEXT:
        raise ModelError(
            f"{CONFIG_FILE}: max_position_embeddings {context} stretched by {rope.factor:g}",
            f"a context of at most {MAX_CONTEXT} tokens",
        )
    return served
