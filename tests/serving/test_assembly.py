"""What a configuration means before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tokenloom.config import make_config
from tokenloom.errors import InvalidParameter, UnsupportedFeature
from tokenloom.kernels.native import extension
from tokenloom.models.loading import describe_model
from tokenloom.serving import assembly
from tokenloom.serving.assembly import build_engine, choose_formats, choose_ops
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.threads import num_threads

needs_native = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("describe_model", "load_model", "thread_pool"):
        monkeypatch.setattr(assembly, name, never)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"kernels": "native", "dtype": "float16"}, "dtype float16", marks=needs_native),
        pytest.param(
            {"isa": "neon" if os.uname().machine == "x86_64" else "avx2"}, "isa", marks=needs_native
        ),
        ({"kernels": "reference", "isa": "portable"}, "isa portable"),
        ({"kernels": "reference", "kv_dtype": "int8"}, "kv_dtype int8"),
        ({"kernels": "reference", "weight_cache": "somewhere"}, "weight_cache"),
    ],
)
def test_refused_before_anything_is_loaded(
    tiny_model: Path, nothing_is_loaded: None, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        build_engine(make_config({"model": str(tiny_model), **options}, env={}), SilentLoad())
    assert str(caught.value).startswith(named)


def test_formats_of_a_float32_model(tiny_model: Path) -> None:
    def formats(**options: str) -> tuple[str, str]:
        config = make_config({"kernels": "reference", **options}, env={})
        described = describe_model(tiny_model, weights=config.model.weights)
        found = choose_formats(config, described, choose_ops(config))
        return found.dtype, found.kv_dtype

    assert formats() == ("float32", "float32")
    assert formats(weights="int8") == ("float32", "float32")
    assert formats(dtype="bfloat16") == ("bfloat16", "bfloat16")
    assert formats(dtype="bfloat16", kv_dtype="float32") == ("bfloat16", "float32")
    if extension.missing() is None:
        assert formats(kernels="native") == ("float32", "float32")
        assert formats(kernels="native", weights="int8") == ("bfloat16", "bfloat16")
        assert formats(kernels="native", weights="int8", dtype="float32") == ("float32", "float32")


def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidParameter, match="threads: got 257, but it must be 0 to 256"):
        make_config({"threads": 257}, env={})
    assert make_config({"threads": 256}, env={}).runtime.threads == 256
    # The bound holds for the default as well.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2000)), raising=False)
    assert num_threads(0) == 256
    assert num_threads(3) == 3
