"""How `fuzz_files` bends files: by their structure, and byte by byte. Every choice comes from the generator that is
given."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from tools.fuzz_originals import ARRAY, Files, Gguf, text_of

_INTEGERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 64, 100, 127, 128, 255, 256, 1000, 1 << 12, 1 << 15, 1 << 16,
    1 << 20, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 53) + 1, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, 1 << 64, 10**30, -(1 << 31), -(1 << 63), 10**400,
)  # fmt: skip
_FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    -1.0,
    1e-5,
    1e-30,
    1e-45,
    1e-300,
    3e38,
    1e300,
    float("nan"),
    float("inf"),
)
_TEXTS = (
    "", " ", "a", "\x00", "é", "▁", "\ud800", "</s>", "{{ 1 }}", "{% for i in range(10**9) %}x{% endfor %}", "(a+)+$",
    "../../x", "/etc/passwd", "auto", "default", "yarn", "linear", "dynamic", "silu", "gelu", "float16", "F32", "BF16",
    "I64", "F8_E4M3", "BOOL", "U8", "awq", "gptq", "re:.*", "full_attention", "sliding_attention", "llama", "gpt2",
)  # fmt: skip
_KEYS = (
    "head_dim", "rope_scaling", "rope_theta", "rope_parameters", "sliding_window", "layer_types", "quantization_config",
    "attention_bias", "mlp_bias", "num_experts", "num_experts_per_tok", "partial_rotary_factor", "text_config",
    "norm_topk_prob", "mlp_only_layers", "add_bos_token", "chat_template", "added_tokens_decoder", "eos_token", "type",
    "pattern", "vocab", "merges", "content", "special", "dtype", "shape", "data_offsets", "__metadata__", "weight_map",
    "ignore", "config_groups", "targets", "group_size", "bits", "compression_config", "torch_dtype", "layer_norm_eps",
)  # fmt: skip
_DEEP, _AGAIN = "@deep@", "@again@"


def mutate(rng: random.Random, files: Files, others: Sequence[Files]) -> Files:
    """`files` with one or two of them bent; parts may come from `others`."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not files:
            break
        name = rng.choice(sorted(files))
        if rng.random() < 0.02:
            del files[name]
        elif rng.random() < 0.03:
            other = rng.choice(others)
            files[name] = other.get(name, files[name])
        else:
            files[name] = _mutate_file(rng, name, files[name], others)
    return files


def _mutate_file(rng: random.Random, name: str, data: bytes, others: Sequence[Files]) -> bytes:
    if name.endswith(".json"):
        return mutate_json(rng, data) if rng.random() < 0.8 else mutate_bytes(rng, data)
    if name.endswith(".safetensors"):
        return _mutate_safetensors(rng, name, data, others)
    return mutate_bytes(rng, data)


# --- bytes -------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes, end: int | None = None) -> bytes:
    """Changes, drops, doubles and puts in some bytes before `end`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(max(min(end or len(out), len(out)), 1))
        change = rng.randrange(7)
        if change == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            out[at : at + rng.choice((1, 4, 8))] = rng.choice(
                (b"\xff", b"\0", b"\x7f", b"\x80")
            ) * rng.choice((1, 4, 8))
        elif change == 2:
            del out[at : at + rng.choice((1, 2, 8, 100))]
        elif change == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif change == 4:
            out[at:at] = out[at : at + rng.choice((1, 10, 100))]
        elif change == 5:
            del out[at if rng.random() < 0.3 else max(len(out) - rng.choice((1, 8, 1000)), 0) :]
        elif out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
    return bytes(out)


# --- JSON --------------------------------------------------------------------------------------------------


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """The object in `data` with some values of another type, size, name or place."""
    try:
        tree = [json.loads(data)]
    except (ValueError, RecursionError):  # bent before
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        _change(rng, tree)
    text = json.dumps(tree[0], ensure_ascii=rng.random() < 0.8)
    depth = rng.choice((10, 200, 2000, 100_000))
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth, 3).replace(_AGAIN, "")
    out = text.encode("utf-8", "surrogatepass")
    return out if rng.random() < 0.95 else mutate_bytes(rng, out)


def _change(rng: random.Random, tree: list[Any]) -> None:
    container, key = _place(rng, tree)
    value = container[key]
    change = rng.randrange(11)
    if change < 3:
        container[key] = _junk(rng)
    elif change == 3:
        container[key] = _nudged(rng, value)
    elif change == 4 and container is not tree:
        del container[key]
    elif change == 5:
        other, there = _place(rng, tree)
        container[key] = deepcopy(other[there])
    elif change == 6 and isinstance(container, dict):
        container[rng.choice((*_KEYS, *_TEXTS, str(rng.choice(_INTEGERS))))] = container.pop(key)
    elif change == 7 and isinstance(value, dict):
        value[rng.choice(_KEYS)] = _junk(rng)
    elif change == 8 and isinstance(container, dict):
        container[str(key) + _AGAIN] = _junk(rng)
    elif change == 9:
        # What is large is not multiplied much: that would only test the memory of this program.
        is_large = isinstance(value, dict | list) or (isinstance(value, str) and len(value) > 100)
        times = rng.choice((2, 4) if is_large else (2, 50, 3000))
        container[key] = rng.choice(([value], {"": value}, {str(key): value}, [value] * times))
    elif change == 10 and isinstance(value, list) and value:
        rng.shuffle(value)
        value += value[: rng.choice((1, 10))]


def _place(rng: random.Random, tree: list[Any]) -> tuple[Any, Any]:
    """A container and a key in it, found from the root down."""
    container, key = tree, 0
    while True:
        value = container[key]
        if not isinstance(value, dict | list) or not value or (rng.random() < 0.15 and container is not tree):
            return container, key
        container = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))


def _junk(rng: random.Random) -> Any:
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(_INTEGERS)
    if kind < 6:
        return rng.choice(_FLOATS)
    if kind < 8:
        return rng.choice(_TEXTS)
    if kind == 8:
        return rng.choice(_TEXTS) * rng.choice((10, 1000, 100_000))
    if kind == 9:
        return rng.choice((None, True, False))
    if kind == 10:
        return rng.choice(
            ([], {}, [[]], [None] * 1000, list(_INTEGERS[:8]), dict.fromkeys(_KEYS, 1), {"": {"": {}}})
        )
    return _DEEP


def _nudged(rng: random.Random, value: Any) -> Any:
    """A value near, or far away in the same direction."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            (
                value + 1,
                value - 1,
                value * 2,
                value // 2,
                -value,
                value * 1000,
                value * 10**9,
                float(value % (1 << 60)),
            )
        )
    if isinstance(value, float):
        return rng.choice((value * 2, -value, value * 1e10, value / 1e10, value + 1e-6))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            (value[:at], value + value, value[:at] + rng.choice(_TEXTS) + value[at:], value.upper())
        )
    return _junk(rng)


# --- safetensors -------------------------------------------------------------------------------------------


def _mutate_safetensors(rng: random.Random, name: str, data: bytes, others: Sequence[Files]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.65:
        header = mutate_json(rng, header)
        length = len(header)
    elif choice < 0.75:
        length = abs(_nudged(rng, length)) if rng.random() < 0.5 else rng.choice(_INTEGERS)
    elif choice < 0.8:
        header = mutate_bytes(rng, header)
    elif choice < 0.85:
        spliced = rng.choice(others).get(name, data)
        length = int.from_bytes(spliced[:8], "little")
        header = spliced[8 : 8 + length]
    else:
        numbers = mutate_bytes(rng, numbers)
    return (int(length) % (1 << 64)).to_bytes(8, "little") + header + numbers


# --- GGUF --------------------------------------------------------------------------------------------------


def mutate_gguf(rng: random.Random, original: Gguf, others: Sequence[Gguf]) -> bytes:
    """A GGUF file with entries, tensors, counts or bytes that are not as they were."""
    file = Gguf(
        list(original.entries), [(n, list(d), k, o) for n, d, k, o in original.tensors], original.data
    )
    counts = [0, 0]
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.random()
        if choice < 0.45:
            _change_entry(rng, file, rng.choice(others))
        elif choice < 0.8:
            _change_tensor(rng, file, rng.choice(others))
        elif choice < 0.85:
            counts[rng.randrange(2)] = rng.choice(_INTEGERS)
        elif choice < 0.88:
            file.version = rng.choice((0, 1, 2, 4, 3 << 24, 1 << 31))
        elif choice < 0.95:
            file.data = mutate_bytes(rng, file.data)
        else:
            dumped = file.dump()
            return mutate_bytes(rng, dumped, len(dumped) - len(file.data))
    return file.dump(*counts)


def _change_entry(rng: random.Random, file: Gguf, other: Gguf) -> None:
    at = rng.randrange(len(file.entries)) if file.entries else 0
    if not file.entries or rng.random() < 0.15:
        file.entries.insert(at, rng.choice(other.entries))
        return
    key, kind, value = file.entries[at]
    change = rng.randrange(8)
    if change == 0:
        del file.entries[at]
    elif change == 1:
        file.entries[at] = (key, rng.choice((*range(14), 1 << 31)), value)
    elif change == 2:
        file.entries[at] = (key, kind, mutate_bytes(rng, value))
    elif change == 3:
        file.entries[at] = (mutate_bytes(rng, key), kind, value)
    elif change == 4 and kind == ARRAY and len(value) >= 12:
        item, count = struct.unpack("<IQ", value[:12])
        count = rng.choice((count + 1, count - 1, count // 2, *(n % (1 << 64) for n in _INTEGERS)))
        file.entries[at] = (
            key,
            kind,
            struct.pack("<IQ", rng.choice((item, item, rng.randrange(14))), count) + value[12:],
        )
    elif change == 5:
        file.entries[at] = (
            key,
            8,
            text_of(rng.choice(_TEXTS).encode("utf-8", "surrogatepass") * rng.choice((1, 5000))),
        )
    elif change == 6:
        file.entries[at] = (key, 6, struct.pack("<d", rng.choice(_FLOATS))[4:])
    else:
        size, number = rng.choice(((4, 4), (5, 4), (10, 8), (11, 8), (0, 1), (7, 1)))
        file.entries[at] = (key, size, (rng.choice(_INTEGERS) % (1 << 8 * number)).to_bytes(number, "little"))


def _change_tensor(rng: random.Random, file: Gguf, other: Gguf) -> None:
    if not file.tensors or rng.random() < 0.1:
        file.tensors.append(rng.choice(other.tensors))
        return
    at = rng.randrange(len(file.tensors))
    name, dims, kind, offset = file.tensors[at]
    change = rng.randrange(6)
    if change == 0:
        del file.tensors[at]
        return
    if change == 1:
        name = rng.choice(
            (mutate_bytes(rng, name), rng.choice(file.tensors)[0], rng.choice(other.tensors)[0])
        )
    elif change == 2 and dims:
        i = rng.randrange(len(dims))
        dims[i] = abs(int(rng.choice((_nudged(rng, dims[i]), rng.choice(_INTEGERS))))) % (1 << 64)
    elif change == 3:
        dims = rng.choice((dims[::-1], [*dims, 1], dims[:-1], [*dims, *dims, *dims], [1, *dims]))
    elif change == 4:
        kind = rng.choice((*range(42), 1 << 31))
    else:
        choices = (offset + 32, offset - 32, offset + 1, rng.choice(file.tensors)[3], rng.choice(_INTEGERS))
        offset = rng.choice(choices) % (1 << 64)
    file.tensors[at] = (name, dims, kind, offset)
