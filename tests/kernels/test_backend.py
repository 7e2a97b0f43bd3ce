"""Which kernels compute: what was asked for by name is used or refused by name."""

from __future__ import annotations

import pytest

from tokenloom.errors import UnsupportedFeature
from tokenloom.kernels.backend import choose_kernels
from tokenloom.kernels.native import extension


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(extension, "isas", lambda: ["avx512", "avx2", "portable"])


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "it was not built")


def test_the_best_unless_told_otherwise(built: None) -> None:
    assert choose_kernels("auto")[:2] == ("native", "avx512")
    assert choose_kernels("native", dtype="bfloat16")[:2] == ("native", "avx512")
    assert choose_kernels("native", isa="portable") == ("native", "portable", "asked for by name")
    assert choose_kernels("reference") == ("reference", "", "asked for by name")


def test_float16_is_for_the_reference(built: None) -> None:
    assert choose_kernels("auto", dtype="float16") == (
        "reference",
        "",
        "the native kernels compute in float32 or bfloat16",
    )
    with pytest.raises(UnsupportedFeature, match="dtype float16 .*float32 or bfloat16; kernels reference"):
        choose_kernels("native", dtype="float16")


def test_an_instruction_set_that_is_not_here(built: None) -> None:
    for kernels in ("auto", "native"):
        with pytest.raises(UnsupportedFeature, match="isa neon .*avx512, avx2, portable"):
            choose_kernels(kernels, isa="neon")


def test_an_instruction_set_without_native_kernels(built: None) -> None:
    with pytest.raises(UnsupportedFeature, match=r"isa avx2 .*reference would compute \(asked for by name\)"):
        choose_kernels("reference", isa="avx2")
    with pytest.raises(UnsupportedFeature, match="isa avx2 .*float32 or bfloat16"):
        choose_kernels("auto", dtype="float16", isa="avx2")


def test_what_was_not_built(not_built: None) -> None:
    assert choose_kernels("auto") == ("reference", "", "it was not built")
    assert choose_kernels("reference") == ("reference", "", "asked for by name")
    with pytest.raises(UnsupportedFeature, match="kernels native .*it was not built"):
        choose_kernels("native", dtype="float16")
    with pytest.raises(UnsupportedFeature, match="isa avx2 .*it was not built"):
        choose_kernels("auto", isa="avx2")


MODULE = "tokenloom.kernels.native._native"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError(f"No module named {MODULE!r}", name=MODULE), "there is no extension"),
        (ModuleNotFoundError("No module named 'zlib'", name="zlib"), "does not load: No module named 'zlib'"),
        (ImportError("libstdc++.so.6: version not found", name=MODULE), "does not load: libstdc"),
    ],
)
def test_why_the_extension_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, message: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(extension, "import_module", fail)
    with pytest.raises(UnsupportedFeature) as caught:
        extension.load()
    assert message in str(caught.value)
    assert ("pip install -v ." in str(caught.value)) == message.startswith("there is no")
