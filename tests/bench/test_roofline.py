"""The roofline of small models: every op is there, and the numbers follow from the shapes."""

from __future__ import annotations

import math

import pytest

from tests.kernels.harness import NATIVE, Numerics, each_numerics, make_executor, small_config
from tokenloom.bench.roofline import Limits, StepReport, measure, measure_limits, native_backend
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.models.config import ModelConfig

LIMITS = Limits(bandwidth=1e10, peaks={"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}, threads=1)
OPS = {
    "embed",
    "rmsnorm",
    "linear q_proj+k_proj+v_proj",
    "ropestore",
    "attention",
    "linear o_proj",
    "linear gate_proj+up_proj",
    "linear down_proj",
    "head",
    "plan",
}
KV_ITEM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 24}
"""Of the 24 dimensions of a head; in 8 bits they share a float32 scale."""


def measured(config: ModelConfig, numerics: Numerics, max_context: int = 1024) -> list[StepReport]:
    executor = make_executor(config, numerics)
    try:
        return measure(native_backend(executor.backend), LIMITS, max_context=max_context, rounds=2)
    finally:
        executor.close()


@each_numerics(*NATIVE)
def test_every_op_is_reported(numerics: Numerics) -> None:
    config = small_config()
    reports = measured(config, numerics)
    # 32 sequences need more than the 96 pages.
    assert [report.case for report in reports] == ["decode 1", "decode 8", "prefill 512"]
    for report in reports:
        assert {op.op for op in report.ops} == OPS
        assert report.seconds == pytest.approx(sum(op.seconds for op in report.ops))
        least = sum(op.fraction * op.seconds for op in report.ops)
        assert report.fraction == pytest.approx(least / report.seconds)
        for op in report.ops:
            assert math.isfinite(op.fraction)
            assert op.seconds >= 0
            priced = op.op in ("attention", "head") or op.op.startswith("linear ")
            assert (op.bytes > 0) == (op.operations > 0) == priced
        assert report.as_dict()["ops"][0].keys() == {"op", "seconds", "bytes", "operations", "fraction"}


@each_numerics(*NATIVE)
def test_attention_reads_keys_values_and_scales(numerics: Numerics) -> None:
    config = small_config()
    for report, keys in zip(measured(config, numerics), (129, 8 * 129, 512), strict=True):
        [attention] = [op for op in report.ops if op.op == "attention"]
        elements = config.num_layers * keys * 2 * config.num_kv_heads * config.head_dim
        assert attention.bytes == round(elements * KV_ITEM_BYTES[numerics.kv_dtype])


@each_numerics(Numerics("native"))
def test_small_vocabularies_and_contexts(numerics: Numerics) -> None:
    assert len(measured(small_config(vocab_size=5), numerics)) == 3
    assert [report.case for report in measured(small_config(), numerics, 300)] == ["decode 1", "decode 8"]
    with pytest.raises(InvalidParameter, match="max_context"):
        measured(small_config(), numerics, 100)


@each_numerics(Numerics("native"))
def test_the_limits_of_this_machine(numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenloom.bench.roofline._SWEEP_BYTES", 1 << 20)
    monkeypatch.setattr("tokenloom.bench.roofline._PEAK_ITERATIONS", 1000)
    limits = measure_limits(2, "portable")
    assert limits.threads == 2
    assert limits.bandwidth > 0
    assert limits.peaks.keys() == LIMITS.peaks.keys()
    assert min(limits.peaks.values()) > 0


def test_the_reference_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="roofline of the reference backend"):
        native_backend(make_executor(small_config()).backend)
