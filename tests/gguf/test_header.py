"""The header of a GGUF file: what is read, and what a broken or hostile one gives instead of a crash."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.gguf import builder as b
from tokenloom.errors import ModelError
from tokenloom.gguf import types
from tokenloom.gguf.file import GgufFile, find_gguf
from tokenloom.gguf.header import MAX_DIMENSION, parse_header


def test_a_sound_file(tmp_path: Path) -> None:
    entries = [
        b.uint32("general.alignment", 64),
        b.entry("a.flag", b.BOOL, b"\1"),
        b.entry("a.number", b.FLOAT32, struct.pack("<f", 0.5)),
        b.entry("a.text", b.STRING, b.text("größer")),
        b.strings("a.words", ["", "é", "x" * 100]),
        b.entry("a.numbers", b.ARRAY, struct.pack("<IQ3i", b.INT32, 3, 1, -2, 3)),
        b.entry("a.flags", b.ARRAY, struct.pack("<IQ2B", b.BOOL, 2, 1, 0)),
    ]
    tensors = [b.tensor("one", [3, 2], offset=64), b.tensor("two", [32], b.Q8_0)]
    data = bytes(range(34)) + bytes(30) + np.arange(6, dtype=np.float32).tobytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(b.file(entries, tensors, data, alignment=64))
    with GgufFile(path) as file:
        assert (file.flag("a.flag", False), file.number("a.number"), file.text("a.text")) == (
            True,
            0.5,
            "größer",
        )
        assert file.strings("a.words") == ["", "é", "x" * 100]
        assert file.numbers("a.numbers").tolist() == [1, -2, 3]
        assert file.numbers("a.flags").tolist() == [1, 0]
        assert {name: (info.kind.name, info.shape) for name, info in file.tensors.items()} == {
            "one": ("F32", (2, 3)),
            "two": ("Q8_0", (32,)),
        }
        assert file.read(file.tensors["one"]).view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]
        assert bytes(file.read(file.tensors["two"])) == bytes(range(34))
        file.release(file.tensors["one"])
    assert parse_header(b.file(version=2), "file").version == 2


HUGE = (1 << 63) + 5
ONE = b.tensor("x", [8])
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "three bytes": (b"GGU", "cut short"),
    "other magic": (b.file(magic=b"GGML"), "begins with b'GGML'"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", "begins with"),
    "version 1": (b.file(version=1), "version 1"),
    "version 4": (b.file(version=4), "version 4"),
    "big endian": (b.file(version=3 << 24), "big-endian"),
    "only a magic": (b"GGUF", "cut short"),
    "tensors beyond the file": (b.file(num_tensors=HUGE), "tensors"),
    "entries beyond the file": (b.file(num_entries=HUGE), "metadata entries"),
    "one entry too many": (b.file([b.uint32("a", 1)], num_entries=3), "twice"),
    "one tensor too many": (b.file([], [ONE], bytes(32), num_tensors=2), "0 dimensions|cut short"),
    "a key beyond the file": (b.file([struct.pack("<Q", HUGE) + bytes(9)]), "metadata key of"),
    "a key of 70000 bytes": (b.file([b.uint32("k" * 70000, 1)]), "70000 bytes"),
    "a key that is not UTF-8": (b.file([b.entry(b"\xff", b.BOOL, b"\1")]), "not UTF-8"),
    "a key twice": (b.file([b.uint32("a", 1), b.uint32("a", 2)]), "'a' twice"),
    "value type 13": (b.file([b.entry("a", 13, bytes(8))]), "value type 13"),
    "a bool of 2": (b.file([b.entry("a", b.BOOL, b"\2")]), "bool of value 2"),
    "text beyond the file": (
        b.file([b.entry("a", b.STRING, struct.pack("<Q", 1 << 20) + b"x")]),
        "cut short",
    ),
    "text of 2^63 bytes": (b.file([b.entry("a", b.STRING, struct.pack("<Q", HUGE) + b"x")]), "at most"),
    "text that is not UTF-8": (b.file([b.entry("a", b.STRING, b.text(b"\xc3("))]), "not UTF-8"),
    "strings beyond the file": (b.file([b.strings("a", ["x"], count=1 << 40)]), "items in 'a'"),
    "a string that ends elsewhere": (
        b.file([b.entry("a", b.ARRAY, struct.pack("<IQQ", b.STRING, 1, HUGE) + bytes(8))]),
        "cut short",
    ),
    "numbers beyond the file": (
        b.file([b.entry("a", b.ARRAY, struct.pack("<IQ", b.UINT64, 1 << 61) + bytes(8))]),
        "items in 'a'",
    ),
    "an array of arrays": (
        b.file([b.entry("a", b.ARRAY, struct.pack("<IQ", b.ARRAY, 1) + struct.pack("<IQ", b.UINT32, 0))]),
        "array of arrays",
    ),
    "an array of type 77": (b.file([b.entry("a", b.ARRAY, struct.pack("<IQ", 77, 1) + bytes(8))]), "type 77"),
    "alignment 0": (b.file([b.uint32("general.alignment", 0)], [ONE], bytes(32)), "general.alignment = 0"),
    "alignment 48": (b.file([b.uint32("general.alignment", 48)], [ONE], bytes(32)), "general.alignment = 48"),
    "alignment 2^31": (b.file([b.uint32("general.alignment", 1 << 31)], [ONE], bytes(32)), "power of two"),
    "alignment in words": (
        b.file([b.entry("general.alignment", b.STRING, b.text("32"))], [ONE], bytes(32)),
        "general.alignment = '32'",
    ),
    "a name of 64 bytes": (b.file([], [b.tensor("n" * 64, [8])], bytes(32)), "name of 64 bytes"),
    "a name that is not UTF-8": (b.file([], [b.tensor(b"\xff", [8])], bytes(32)), "not UTF-8"),
    "no dimensions": (b.file([], [b.tensor("x", [])], bytes(32)), "0 dimensions"),
    "five dimensions": (b.file([], [b.tensor("x", [1, 1, 1, 1, 8])], bytes(32)), "5 dimensions"),
    "2^32 - 1 dimensions": (
        b.file([], [b.text("x") + struct.pack("<I", 0xFFFFFFFF) + bytes(64)], bytes(32)),
        "4294967295 dimensions",
    ),
    "a dimension of 0": (b.file([], [b.tensor("x", [8, 0])], bytes(32)), "shape"),
    "a dimension of 2^64 - 1": (b.file([], [b.tensor("x", [8, (1 << 64) - 1])], bytes(32)), "shape"),
    "a product beyond 2^64": (
        b.file([], [b.tensor("x", [MAX_DIMENSION] * 4)], bytes(32)),
        "ends at byte",
    ),
    "rows that are no blocks": (b.file([], [b.tensor("x", [40], b.Q8_0)], bytes(64)), "multiple of 32"),
    "rows that are no superblocks": (b.file([], [b.tensor("x", [32], b.Q4_K)], bytes(64)), "multiple of 256"),
    "type IQ2_XXS": (b.file([], [b.tensor("x", [256], 16)], bytes(256)), "IQ2_XXS"),
    "type Q2_K": (b.file([], [b.tensor("x", [256], 10)], bytes(256)), "Q2_K"),
    "type 4, which is gone": (
        b.file([], [b.tensor("x", [256], 4)], bytes(256)),
        "number 4, which is unknown",
    ),
    "type 2^32 - 1": (b.file([], [b.tensor("x", [256], 0xFFFFFFFF)], bytes(256)), "number 4294967295"),
    "a tensor twice": (b.file([], [ONE, b.tensor("x", [8], offset=32)], bytes(64)), "'x' twice"),
    "tensors that overlap": (
        b.file([], [b.tensor("x", [16]), b.tensor("y", [8], offset=32)], bytes(64)),
        "'x' and 'y' overlap",
    ),
    "tensors in one place": (b.file([], [ONE, b.tensor("y", [8])], bytes(32)), "overlap"),
    "an offset between": (b.file([], [b.tensor("x", [8], offset=4)], bytes(64)), "offset 4"),
    "an offset beyond": (b.file([], [b.tensor("x", [8], offset=64)], bytes(32)), "ends at byte"),
    "an offset of 2^64 - 32": (b.file([], [b.tensor("x", [8], offset=(1 << 64) - 32)], bytes(32)), "ends at"),
    "a tensor cut short": (b.file([], [ONE], bytes(31)), "ends at byte"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    data, found = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=found):
            GgufFile(path)
        # What the counts promise is never allocated.
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 2 * len(data)
    finally:
        tracemalloc.stop()


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = b.file([b.uint32("a", 1), b.strings("words", ["x", "yy"])], [ONE], bytes(32))
    parse_header(whole, "file")
    for length in range(len(whole)):
        with pytest.raises(ModelError):
            parse_header(whole[:length], "file")


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(ModelError):
            GgufFile(path)


def test_look_ups_name_key_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    nan = b.entry("nan", b.FLOAT32, struct.pack("<f", float("nan")))
    path.write_bytes(b.file([b.uint32("n", 7), nan, b.strings("words", ["x"])]))
    with GgufFile(path) as file:
        assert file.integer("n", 0, 7) == 7
        assert file.optional_integer("absent", 0, 1) is None
        assert file.number("absent", 0.25) == 0.25
        for call in (
            lambda: file.integer("n", 0, 6),
            lambda: file.integer("absent", 0, 6),
            lambda: file.integer("words", 0, 6),
            lambda: file.number("nan"),
            lambda: file.flag("n", True),
            lambda: file.text("n"),
            lambda: file.strings("n"),
            lambda: file.strings("absent"),
            lambda: file.numbers("words"),
        ):
            with pytest.raises(ModelError, match=r"\b(n|nan|words|absent)\b"):
                call()


def test_which_file_a_path_means(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "absent") is None
    one = tmp_path / "one.gguf"
    one.write_bytes(b.file())
    assert find_gguf(one) == one
    assert find_gguf(tmp_path) == one
    (tmp_path / "two.GGUF").write_bytes(b.file())
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None


def test_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle here")
    for number in gguf.GGMLQuantizationType:
        assert types.type_name(number) in (number.name, f"number {number.value}, which is unknown")
    for kind in types.TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
