"""`quantization_config` of a config.json: which linears are stored in 4 bits, and how.

Read as transformers, AutoAWQ, AutoGPTQ and GPTQModel write it. Fields that change what the tensors mean and
are not offered are refused by name; those that say how the weights were found (damp_percent, mse, static_groups,
true_sequential ...) or which kernels to run (backend, do_fuse ...) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.quantization import awq, gptq
from tokenloom.quantization.packed_parts import Shape
from tokenloom.quantization.weights import GROUPS, Int4Matrix

Method = Literal["awq", "gptq"]

METHODS: Final[tuple[Method, ...]] = ("awq", "gptq")
FIELD: Final = "quantization_config"

_HEAD: Final = "lm_head"
_PARTS: Final = ("qweight", "qzeros", "scales")
_GPTQ_FORMATS: Final = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantization:
    """How the linears of a checkpoint are stored.

    `group` inputs share a scale and a zero. `zero_offset` is added to a stored zero. `symmetric`: every zero
    should be 8. `needs_order` (desc_act): a linear must say with its g_idx that its inputs are in order.
    Modules whose names contain one of `skipped` stay as they were; where `only` is not empty, so do those
    whose names end with none of it. `converts_head`: the output head is stored in 4 bits too.
    """

    method: Method
    group: int
    zero_offset: int = 0
    symmetric: bool = False
    needs_order: bool = False
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    converts_head: bool = False

    def converts(self, module: str) -> bool:
        """Whether the linear `module`, such as "model.layers.0.mlp.up_proj", is stored in 4 bits."""
        if any(pattern in module for pattern in self.skipped):
            return False
        if module == _HEAD:
            return self.converts_head
        return not self.only or any(f".{module}".endswith(f".{suffix}") for suffix in self.only)

    @property
    def parts(self) -> tuple[str, ...]:
        """Suffixes of the tensors that a linear is stored in."""
        return (*_PARTS, "g_idx") if self.needs_order else _PARTS

    @property
    def optional_parts(self) -> tuple[str, ...]:
        """Suffixes of tensors that may be there as well."""
        return ("g_idx",) if self.method == "gptq" and not self.needs_order else ()

    def shape(self, module: str, found: Mapping[str, Shape]) -> tuple[int, int]:
        """(N, K) from the shapes of the parts of `module`. Raises `ModelError` if they do not fit."""
        if self.method == "awq":
            return awq.shape(module, found, self.group)
        return gptq.shape(module, found, self.group)

    def unpack(self, module: str, tensors: Mapping[str, NDArray[Any]]) -> Int4Matrix:
        """The weight of `module` from its parts by suffix. Raises `ModelError` as the method's `unpack`."""
        if self.method == "awq":
            return awq.unpack(module, tensors, self.group)
        return gptq.unpack(
            module, tensors, self.group, zero_offset=self.zero_offset, symmetric=self.symmetric
        )


def parse_quantization(config: Mapping[str, Any], file: str = "config.json") -> WeightQuantization | None:
    """The `quantization_config` in `config`, the object of a config.json; None where it is absent or null.

    Raises `ModelError`, with the field's name and value, for what is malformed or not offered.
    """
    if config.get("compression_config") is not None:
        raise ModelError(f"{file}: compression_config", f"{FIELD} with quant_method {' or '.join(METHODS)}")
    value = config.get(FIELD)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ModelError(f"{file}: {FIELD} = {_shorten(value)}", "an object")
    written = _Written(value, file)
    method = value.get("quant_method")
    if method == "awq":
        return _awq(written)
    if method != "gptq":
        written.refuse("quant_method", " or ".join(METHODS))
    return _gptq(written)


def _awq(written: _Written) -> WeightQuantization:
    version = written.data.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        written.refuse("version", "'gemm'")
    if written.data.get("backend") == "llm-awq":
        written.refuse("backend", "'autoawq'")
    if not written.flag("zero_point", True):
        written.refuse("zero_point", "true")
    return WeightQuantization(
        method="awq", group=written.group(), skipped=written.names("modules_to_not_convert")
    )


def _gptq(written: _Written) -> WeightQuantization:
    # AutoGPTQ calls the field checkpoint_format, newer releases of GPTQModel format.
    field = "checkpoint_format" if written.data.get("checkpoint_format") is not None else "format"
    stored = written.data.get(field)
    stored = "gptq" if stored is None else stored
    if not isinstance(stored, str) or stored not in _GPTQ_FORMATS:
        written.refuse(field, " or ".join(_GPTQ_FORMATS))
    if written.data.get("pack_dtype", "int32") != "int32":
        written.refuse("pack_dtype", "'int32'")
    if written.data.get("dynamic"):
        written.refuse("dynamic", "one format for all linears")
    if written.flag("is_marlin_format", False):
        written.refuse("is_marlin_format", "false")
    return WeightQuantization(
        method="gptq",
        group=written.group(),
        zero_offset=_GPTQ_FORMATS[stored],
        symmetric=written.flag("sym", False),
        needs_order=written.flag("desc_act", False),
        skipped=written.names("modules_to_not_convert"),
        only=written.names("modules_in_block_to_quantize"),
        converts_head=written.flag("lm_head", False),
    )


class _Written:
    """Look-ups in the object; every method raises `ModelError` with the field's name and value."""

    def __init__(self, data: Mapping[str, Any], file: str) -> None:
        self.data = data
        self._file = file

    def refuse(self, name: str, supported: str) -> NoReturn:
        method = _shorten(self.data.get("quant_method"))
        of = "" if name == "quant_method" else f" (quant_method {method})"
        if name not in self.data:
            raise ModelError(f"{self._file} without {FIELD}.{name}{of}", supported)
        raise ModelError(f"{self._file}: {FIELD}.{name} = {_shorten(self.data[name])}{of}", supported)

    def group(self) -> int:
        """The group size, of numbers of 4 bits."""
        bits, group = self.data.get("bits"), self.data.get("group_size")
        if type(bits) is not int or bits != 4:
            self.refuse("bits", "4")
        if type(group) is not int or group not in GROUPS:
            self.refuse("group_size", ", ".join(map(str, GROUPS)))
        return group

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return default if value is None else value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, or of lists of names, flat; empty where it is absent or null."""
        value = self.data.get(name)
        flat: list[str] = []
        for item in value if isinstance(value, list) else [] if value is None else [None]:
            for text in item if isinstance(item, list) else [item]:
                if not isinstance(text, str) or not text:
                    self.refuse(name, "a list of names of modules")
                flat.append(text)
        return tuple(flat)


def _shorten(value: object, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
