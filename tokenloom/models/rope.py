"""Tables of the rotary position embedding, fixed when the model is loaded.

The frequencies follow transformers step by step in float32, so that its models and ours rotate by the same
angles; powers, sines and cosines go through float64 and are rounded once, so that the tables do not depend on
the machine's vector library. Sources: RoFormer (Su et al. 2021), linear interpolation (Chen et al. 2023),
NTK-aware "dynamic" (bloc97 2023), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024), Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import InvalidParameter, OutOfMemory
from tokenloom.models.config import ModelConfig, RopeConfig

Float32 = NDArray[np.float32]

MAX_TABLE_BYTES = 1 << 30
"""Largest cos and sin tables together: two million tokens at a head size of 128."""

_BLOCK_ROWS = 4096
"""Positions computed at a time, which bounds the float64 temporaries."""


def rope_tables(config: ModelConfig, max_context: int | None = None) -> tuple[Float32, Float32]:
    """cos and sin, float32 [max_context, rotary_dim / 2], of the angle position * frequency, times the
    attention factor of the rope type. `max_context` None takes `config.max_context`. Those of `local_rope`, if
    the model has one, follow: [2 * max_context, rotary_dim / 2].

    Row p does not depend on `max_context`. Raises `InvalidParameter` beyond `config.max_context`, and
    `OutOfMemory` if the tables would exceed `MAX_TABLE_BYTES`.
    """
    context = check_context(config, max_context)
    table_bytes(config, context)
    tables = [_table(rope, context) for rope in (config.rope, config.local_rope) if rope is not None]
    if len(tables) == 1:
        return tables[0]
    return np.concatenate([cos for cos, _ in tables]), np.concatenate([sin for _, sin in tables])


def _table(rope: RopeConfig, context: int) -> tuple[Float32, Float32]:
    half = rope.rotary_dim // 2
    frequencies, scale = inverse_frequencies(rope)
    cos = np.empty((context, half), np.float32)
    sin = np.empty((context, half), np.float32)
    for start in range(0, context, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, context))
        positions = np.arange(rows.start, rows.stop).astype(np.float32)
        # The angle is rounded to float32 before the cosine, as in transformers; at position 100000 that is a
        # third digit, and the models were trained with it.
        angles = (positions[:, None] * frequencies).astype(np.float64)
        cos[rows] = np.cos(angles).astype(np.float32) * np.float32(scale)
        sin[rows] = np.sin(angles).astype(np.float32) * np.float32(scale)
    return cos, sin


def table_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of both tables for `context` tokens. Raises `OutOfMemory` beyond `MAX_TABLE_BYTES`."""
    row_bytes = (config.rope.rotary_dim // 2) * 2 * 4 * (1 if config.local_rope is None else 2)
    if context * row_bytes > MAX_TABLE_BYTES:
        raise OutOfMemory(
            f"the RoPE tables of {context} tokens need {context * row_bytes} bytes, more than "
            f"{MAX_TABLE_BYTES}; set max_context to at most {MAX_TABLE_BYTES // row_bytes}"
        )
    return context * row_bytes


def check_context(config: ModelConfig, max_context: int | None) -> int:
    """`max_context` if the model can serve it (None or 0: all that it can).

    Raises `InvalidParameter`, which names the rope type where that is the reason.
    """
    if not max_context:
        return config.max_context
    if max_context < 1:
        raise InvalidParameter("max_context", max_context, f"from 1 to {config.max_context}")
    if max_context > config.max_context:
        limit = f"at most {config.max_context}, the context of this model"
        if config.rope.kind in ("dynamic", "longrope"):
            limit = (
                f"at most {config.max_context}: rope type {config.rope.kind!r} is served up to its original "
            )
            limit += f"length {config.rope.original_context}"
        raise InvalidParameter("max_context", max_context, limit)
    return max_context


def limit_context(config: ModelConfig, max_context: int | None) -> ModelConfig:
    """`config` with its context cut to `max_context`. Raises as `check_context`."""
    return replace(config, max_context=check_context(config, max_context))


def inverse_frequencies(rope: RopeConfig) -> tuple[Float32, float]:
    """Frequencies in radians per position, float32 [rotary_dim / 2], and the factor on cos and sin."""
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "longrope":
        return _longrope(rope)
    if rope.kind == "llama3":
        return _llama3(rope), 1.0
    if rope.kind == "dynamic":
        return np.float32(1) / _powers(_dynamic_theta(rope), rope.rotary_dim), 1.0
    plain = np.float32(1) / _powers(rope.theta, rope.rotary_dim)
    return (plain / np.float32(rope.factor) if rope.kind == "linear" else plain), 1.0


def _powers(theta: float, dim: int) -> Float32:
    """theta ** (2 i / dim), float32 [dim / 2]: float32 operands, correctly rounded result."""
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    powers: Float32 = (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)
    return powers


def _original(rope: RopeConfig) -> int:
    if rope.original_context is None:
        raise ValueError(f"rope type {rope.kind!r} without original_context")
    return rope.original_context


def _dynamic_theta(rope: RopeConfig) -> float:
    """The base at the original length, where the stretch is 1 up to rounding; as transformers writes it."""
    original = _original(rope)
    stretch = (rope.factor * original / original) - (rope.factor - 1)
    return float(rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _llama3(rope: RopeConfig) -> Float32:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    original, factor = _original(rope), rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    plain = np.float32(1) / _powers(rope.theta, rope.rotary_dim)
    wavelengths = np.float32(2 * math.pi) / plain
    is_long = wavelengths > np.float32(original / low)
    is_short = wavelengths < np.float32(original / high)
    kept = np.where(is_long, plain / np.float32(factor), plain)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * kept / np.float32(factor) + smooth * kept
    return np.where(is_long | is_short, kept, blended)


def _yarn(rope: RopeConfig) -> tuple[Float32, float]:
    """A ramp from plain to stretched frequencies, between the dimensions that turn `beta_fast` and
    `beta_slow` times within the original length."""
    dim = rope.rotary_dim
    scale = rope.attention_factor
    if scale is None:
        scale = _yarn_mscale(rope.factor, 1.0)
        if rope.mscale and rope.mscale_all_dim:
            scale = _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    low, high = (
        (dim * math.log(_original(rope) / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    powers = _powers(rope.theta, dim)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    plain_share = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    stretched = np.float32(1) / (np.float32(rope.factor) * powers)
    return stretched * (np.float32(1) - plain_share) + (np.float32(1) / powers) * plain_share, scale


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: RopeConfig) -> tuple[Float32, float]:
    """The factors for texts up to the original length, and the attention factor of the whole stretch."""
    scale = rope.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(_original(rope))) if rope.factor > 1 else 1.0
    factors = np.array(rope.short_factor, np.float32)
    return np.float32(1) / (factors * _powers(rope.theta, rope.rotary_dim)), scale
