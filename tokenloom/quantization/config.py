"""`quantization_config` of a config.json: which linears are stored in fewer bits, and how.

Read as transformers, AutoAWQ, AutoGPTQ, GPTQModel, vLLM and llm-compressor write it. Fields that change what the
tensors mean and are not offered are refused by name; those that say how the weights were found (damp_percent, mse,
static_groups, true_sequential, observer ...), which kernels to run (backend, do_fuse ...) or how others round
activations and KV (activation_scheme, input_activations, kv_cache_scheme) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenloom.errors import ModelError
from tokenloom.quantization import compressed_tensors
from tokenloom.quantization.awq import AwqLinear
from tokenloom.quantization.fp8 import Fp8Linear
from tokenloom.quantization.gptq import GptqLinear
from tokenloom.quantization.linear_format import LinearFormat
from tokenloom.quantization.selection import NameSelection, Selection
from tokenloom.quantization.written import Written, shorten

METHODS: Final = ("awq", "gptq", "fp8", "compressed-tensors")
FIELD: Final = "quantization_config"

_OLD_FIELD: Final = "compression_config"
_GPTQ_FORMATS: Final = {"gptq": 1, "gptq_v2": 0}
_KERNEL_FORMS: Final = ("int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantization:
    """How the linears of a checkpoint are stored: the first of `formats` whose selection has the module.

    `by_type`: whether a linear is quantised is told by the type of its weight, and one that is left as it was need
    not be named.
    """

    method: str
    formats: tuple[tuple[Selection, LinearFormat], ...]
    by_type: bool = False

    def format_of(self, module: str) -> LinearFormat | None:
        """How the linear `module`, such as "model.layers.0.mlp.up_proj", is stored; None for one that stays as it
        was."""
        return next((stored for selection, stored in self.formats if selection.selects(module)), None)

    @property
    def is_final(self) -> bool:
        """Whether linears are in a form of 8 or 4 bits that the kernels multiply: to round them again would lose
        twice."""
        return any(stored.form[0] in _KERNEL_FORMS for _, stored in self.formats)


def parse_quantization(config: Mapping[str, Any], file: str = "config.json") -> WeightQuantization | None:
    """The `quantization_config` in `config`, the object of a config.json, or its `compression_config`, as it was
    called once; None where both are absent or null.

    Raises `ModelError`, with the field's name and value, for what is malformed or not offered.
    """
    value, field = config.get(FIELD), FIELD
    if value is None:
        value, field = config.get(_OLD_FIELD), _OLD_FIELD
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ModelError(f"{file}: {field} = {shorten(value)}", "an object")
    written = Written(value, file, field)
    method = value.get("quant_method")
    if field == _OLD_FIELD:
        written.choice("quant_method", None, "sparseml", "compressed-tensors")
    elif method == "awq":
        return _awq(written)
    elif method == "gptq":
        return _gptq(written)
    elif method == "fp8":
        return _fp8(written)
    elif method != "compressed-tensors":
        written.refuse("quant_method", ", ".join(METHODS))
    formats = tuple(compressed_tensors.parse(written))
    return WeightQuantization(method="compressed-tensors", formats=formats)


def _awq(written: Written) -> WeightQuantization:
    version = written.data.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        written.refuse("version", "'gemm'")
    if written.data.get("backend") == "llm-awq":
        written.refuse("backend", "'autoawq'")
    if not written.flag("zero_point", True):
        written.refuse("zero_point", "true")
    written.bits("bits", 4)
    selection = NameSelection(skipped=written.names("modules_to_not_convert"))
    return WeightQuantization(method="awq", formats=((selection, AwqLinear(written.group())),))


def _gptq(written: Written) -> WeightQuantization:
    # AutoGPTQ calls the field checkpoint_format, newer releases of GPTQModel format.
    field = "checkpoint_format" if written.data.get("checkpoint_format") is not None else "format"
    stored = written.choice(field, None, *_GPTQ_FORMATS) or "gptq"
    if written.data.get("pack_dtype", "int32") != "int32":
        written.refuse("pack_dtype", "'int32'")
    if written.data.get("dynamic"):
        written.refuse("dynamic", "one format for all linears")
    if written.flag("is_marlin_format", False):
        written.refuse("is_marlin_format", "false")
    linear = GptqLinear(
        group=written.group(),
        bits=written.bits("bits", 4, 8),
        zero_offset=_GPTQ_FORMATS[stored],
        symmetric=written.flag("sym", False),
        needs_order=written.flag("desc_act", False),
    )
    selection = NameSelection(
        skipped=written.names("modules_to_not_convert"),
        only=written.names("modules_in_block_to_quantize"),
        head=written.flag("lm_head", False),
    )
    return WeightQuantization(method="gptq", formats=((selection, linear),))


def _fp8(written: Written) -> WeightQuantization:
    written.choice("activation_scheme", None, "dynamic", "static")
    written.choice("fmt", None, "e4m3", "e5m2")
    block = (0, 0) if written.data.get("weight_block_size") is None else written.pair("weight_block_size")
    # vLLM calls the field ignored_layers.
    skipped = written.names("modules_to_not_convert") + written.names("ignored_layers")
    selection = NameSelection(skipped=skipped, head=True)
    return WeightQuantization(method="fp8", formats=((selection, Fp8Linear(block)),), by_type=True)
