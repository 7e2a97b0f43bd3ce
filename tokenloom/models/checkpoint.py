"""Tensors of a Hugging Face directory as views of memory-mapped safetensors files.

Nothing is ever unpickled: a directory that has only .bin or .pt files is refused. A shard is named in the
index by a bare file name, so that an index cannot reach outside of the directory; the file of that name may
be a symbolic link and is followed, since the Hugging Face cache keeps its files as links into `../../blobs`.
(Who can place links in the directory can place files there as well; the index is what is downloaded.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError
from tokenloom.models.hf_config import CONFIG_FILE
from tokenloom.models.json_fields import open_regular, read_json, shorten
from tokenloom.models.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorEntry,
    parse_entries,
    parse_header,
)
from tokenloom.quantization.config import parse_quantization
from tokenloom.quantization.fp8 import FLOAT8, widen
from tokenloom.quantization.gguf_blocks import BlockMatrix
from tokenloom.quantization.linear_format import LinearFormat, unpack_linear
from tokenloom.quantization.weights import Int4Matrix, Int8Matrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FULL_HASH_BYTES = 256 << 20
"""Checkpoints up to this size are hashed in full."""

SAMPLE_BYTES = 64 << 10
"""Bytes of one hashed sample of a larger checkpoint's tensor."""

_NUM_SAMPLES = 4
_MAX_SHARDS = 4096
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS: Mapping[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(FLOAT8["float8_e4m3fn"]),
    "F8_E5M2": np.dtype(FLOAT8["float8_e5m2"]),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.uint8),  # any byte may stand there
}
_WEIGHT = ".weight"

INPUT_ORDER = ".input_order"
"""Behind the name of a linear: a source that says which input each column of its matrix belongs to."""


class SafetensorsFile:
    """One mapped file. `entries` lists its tensors; `read` gives a view, `release` drops its pages.
    `size` and `mtime_ns` are those of the file when it was opened.

    Raises `ModelError` if the file is absent, cut short or its header is not sound. The map follows the file:
    one that is cut or overwritten in place while it is mapped can end the process, as with any mapped file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(open_regular(path), "rb") as file:
            status = os.fstat(file.fileno())
            size = self.size = status.st_size
            self.mtime_ns = status.st_mtime_ns
            length = parse_header(file.read(8), size, str(path))
            self.entries = parse_entries(file.read(length), size, str(path))
            try:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path}: {error}", "a file that can be mapped") from None

    def read(self, name: str) -> NDArray[Any]:
        """A read-only view of tensor `name`; valid while the view is held, also after `close`."""
        entry = self.entries[name]
        dtype = _DTYPES[entry.dtype]
        count = (entry.end - entry.begin) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, entry.begin).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; they are read again from the file if needed."""
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Unmap the file; while views are held, it stays mapped until the last one goes."""
        with contextlib.suppress(BufferError):
            self._map.close()


class Checkpoint:
    """The tensors of a directory, by name, over one file or many. Use `Checkpoint.open`; a context manager.

    `config` is the parsed config.json (an empty dict without one), `quantization` what it says about linears
    that are stored in fewer bits. A *source* is a tensor as the program names it: one tensor of the files, or, where
    a linear X is quantised, "X.weight" for its parts X.qweight, X.qzeros and so on, and "X.input_order" where they
    reorder its inputs.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any], owners: Mapping[str, SafetensorsFile]
    ) -> None:
        self.directory = directory
        self.config = config
        self.quantization = parse_quantization(config, CONFIG_FILE)
        self._owners = owners

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Map the files of `directory` and check every header; no tensor is read.

        model.safetensors wins over model.safetensors.index.json, as in transformers. Raises `ModelError`.
        """
        directory = Path(directory)
        if not os.path.isdir(directory):
            raise ModelError(f"no directory {directory}", "a directory in the Hugging Face format")
        config = read_json(directory / CONFIG_FILE) if os.path.exists(directory / CONFIG_FILE) else {}
        if os.path.exists(directory / SINGLE_FILE):
            single = SafetensorsFile(directory / SINGLE_FILE)
            return cls(directory, config, dict.fromkeys(single.entries, single))
        if os.path.exists(directory / INDEX_FILE):
            return cls(directory, config, _open_shards(directory))
        raise ModelError(*_no_weights(directory))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._owners))

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. Raises `ModelError` if there is no such tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Type of a tensor, as numpy names it. Raises `ModelError` if there is no such tensor."""
        return _DTYPES[self._entry(name).dtype].name

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor as stored. Raises `ModelError` if there is no such tensor."""
        entry = self._entry(name)
        return entry.end - entry.begin

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(map(self.tensor_bytes, self._owners))

    @property
    def main_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The float type that most bytes are stored in (norms are often wider than the rest); 8-bit floats count
        as bfloat16, which holds their values."""
        totals = dict.fromkeys(_FLOATS, 0)
        for entry in map(self._entry, self._owners):
            dtype = "BF16" if entry.dtype.startswith("F8_") else entry.dtype
            if dtype in totals:
                totals[dtype] += entry.end - entry.begin
        return _FLOATS[max(totals, key=lambda name: totals[name])]

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the mapped tensor, bf16 as `ml_dtypes.bfloat16`. Raises `ModelError`."""
        self._entry(name)
        return self._owners[name].read(name)

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system once it has been converted."""
        self._owners[name].release(name)

    def linear_format(self, source: str) -> LinearFormat | None:
        """How `source` is stored if it is a quantised linear.

        It counts as one as soon as its main part is there; the others may be missing.
        """
        module = source.removesuffix(_WEIGHT)
        if self.quantization is None or module == source:
            return None
        stored = self.quantization.format_of(module) or self.quantization.formats[0][1]
        main = f"{module}.{stored.main}"
        # Some formats keep the name of the plain tensor: its type tells.
        if main not in self or (main == source and self._entry(main).dtype in _FLOATS):
            return None
        return stored

    def source_tensors(self, source: str) -> tuple[str, ...]:
        """The tensors of the files that `source` is made of; none if it is not there."""
        if source.endswith(INPUT_ORDER):
            module = source.removesuffix(INPUT_ORDER)
            stored = self.linear_format(module + _WEIGHT)
            return () if stored is None or stored.order_part is None else (f"{module}.{stored.order_part}",)
        stored = self.linear_format(source)
        if stored is None:
            return (source,) if source in self else ()
        module = source.removesuffix(_WEIGHT)
        optional = (f"{module}.{part}" for part in stored.optional_parts)
        return (*(f"{module}.{part}" for part in stored.parts), *(name for name in optional if name in self))

    def source_form(self, source: str) -> tuple[str, int]:
        """What `source` gives: (float32, bfloat16 or float16, 0), ("int8", 0), ("int4", inputs to a group), or
        ("int32", 0) for an order of inputs."""
        stored = self.linear_format(source)
        if stored is not None:
            return stored.form
        if source.endswith(INPUT_ORDER):
            return "int32", 0
        dtype = self.dtype(source)
        return ("bfloat16" if dtype in FLOAT8 else dtype), 0

    def blocks(self, source: str) -> BlockMatrix | None:
        """None: blocks are for GGUF."""
        return None

    def source_shape(self, source: str) -> tuple[int, ...]:
        """Shape of a source, [N, K] for a quantised linear, without reading it.

        Raises `ModelError` if it is not there, or if the shapes of its parts do not fit each other.
        """
        stored = self.linear_format(source)
        if stored is None:
            return self.shape(*self.source_tensors(source) or (source,))
        parts = {_part(name): self.shape(name) for name in self.source_tensors(source)}
        return stored.shape(source.removesuffix(_WEIGHT), parts)

    def source_bytes(self, source: str) -> int:
        """Bytes of a source as stored; 0 if it is not there."""
        return sum(map(self.tensor_bytes, self.source_tensors(source)))

    def source(self, source: str) -> NDArray[Any] | Int8Matrix | Int4Matrix:
        """A read-only view of a plain source (8-bit floats as bfloat16), the unpacked matrix of a quantised linear,
        or the order of its inputs.

        Raises `ModelError`, naming the tensor, for parts that are missing, of a wrong type or shape, or
        whose numbers cannot be.
        """
        if source.endswith(INPUT_ORDER):
            order = self.input_order(source.removesuffix(INPUT_ORDER) + _WEIGHT)
            if order is None:
                raise ModelError(f"no {shorten(source)} in {self.directory}", "linears with reordered inputs")
            return order
        stored = self.linear_format(source)
        if stored is not None:
            parts = {_part(name): self.tensor(name) for name in self.source_tensors(source)}
            return unpack_linear(stored, source.removesuffix(_WEIGHT), parts)
        tensor = self.tensor(source)
        return widen(tensor) if tensor.dtype.name in FLOAT8 else tensor

    def input_order(self, source: str) -> NDArray[np.int32] | None:
        """int32 [K]: the input that each column of the linear `source` belongs to; None where they are in order,
        and for parts that do not fit, which `source` refuses. Raises `ModelError` for groups that cannot be."""
        stored = self.linear_format(source)
        if stored is None or stored.order_part is None:
            return None
        module = source.removesuffix(_WEIGHT)
        part = f"{module}.{stored.order_part}"
        if part not in self or self.dtype(part) != "int32" or len(self.shape(part)) != 1:
            return None
        return stored.input_order(module, self.tensor(part))

    def release_source(self, source: str) -> None:
        """Give the pages of a source back to the system once it has been converted."""
        for name in self.source_tensors(source):
            self.release(name)

    def close(self) -> None:
        """Unmap the files (those with living views stay mapped until the views go)."""
        for file in {id(file): file for file in self._owners.values()}.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def content_id(self) -> str:
        """Hex blake2b (128 bits) of config.json and of the tensors: names, types, shapes, bytes.

        It does not depend on the split into files. Up to `FULL_HASH_BYTES` of tensors every byte counts
        (about a second per GB from memory, else the speed of the disk). Above, each tensor counts with 4
        samples of 64 KiB at its start, thirds and end: any fine-tuning changes those, but an edit of a few
        bytes elsewhere is not seen.
        """
        hasher = hashlib.blake2b(b"tokenloom.checkpoint.1\n", digest_size=16)
        config = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        hasher.update(config.encode("utf-8", "surrogatepass") + b"\n")
        is_full = self.num_bytes <= FULL_HASH_BYTES
        for name in self.names:
            entry = self._entry(name)
            label = json.dumps([name, entry.dtype, entry.shape, is_full])
            hasher.update(label.encode("ascii") + b"\n")
            for sample in samples(self.tensor(name), is_full):
                hasher.update(sample.data)
            self.release(name)
        return hasher.hexdigest()

    def files_id(self) -> str:
        """Hex blake2b (128 bits) of names, sizes and modification times of the files that hold the tensors.

        It sees an edit in place that `content_id` does not see, unless that sets the time back. A copy has
        the same only if it keeps names and times.
        """
        files = {file.path.name: file for file in self._owners.values()}
        stamps = [[name, file.size, file.mtime_ns] for name, file in sorted(files.items())]
        return hashlib.blake2b(json.dumps(stamps).encode("ascii"), digest_size=16).hexdigest()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._owners:
            raise ModelError(
                f"no tensor {shorten(name)} in {self.directory}", "the tensors listed in its files"
            )
        return self._owners[name].entries[name]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def samples(tensor: NDArray[Any], is_full: bool) -> Iterator[NDArray[np.uint8]]:
    """What of a tensor's bytes counts for `content_id`: all, or a few samples of a larger one."""
    data = tensor.reshape(-1).view(np.uint8)
    if is_full or len(data) <= _NUM_SAMPLES * SAMPLE_BYTES:
        yield data
        return
    last = len(data) - SAMPLE_BYTES
    for i in range(_NUM_SAMPLES):
        start = last * i // (_NUM_SAMPLES - 1)
        yield data[start : start + SAMPLE_BYTES]


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """The owner of each tensor. A tensor that two shards hold goes to the one that the index names."""
    index = read_json(directory / INDEX_FILE, MAX_HEADER_BYTES)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{INDEX_FILE}: weight_map = {shorten(listed)}", "an object {tensor: file}")
    shard_names = sorted({_shard_name(name) for name in listed.values()})
    if len(shard_names) > _MAX_SHARDS:
        raise ModelError(f"{INDEX_FILE} with {len(shard_names)} files", f"at most {_MAX_SHARDS} files")
    missing = [name for name in shard_names if not os.path.exists(directory / name)]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shard_names)} shards missing in {directory}: {shorten(missing, 500)}",
            "all files that the index names (is the download complete?)",
        )
    shards = {name: SafetensorsFile(directory / name) for name in shard_names}
    owners: dict[str, SafetensorsFile] = {}
    for file in shards.values():
        for tensor in file.entries:
            if tensor in owners and tensor not in listed:
                raise ModelError(
                    f"tensor {shorten(tensor)} in two shards, not listed in the index", "one place each"
                )
            owners[tensor] = file
    for tensor, name in listed.items():
        if tensor not in shards[name].entries:
            raise ModelError(
                f"{INDEX_FILE}: tensor {shorten(tensor)} is not in {name}", "an index that fits its shards"
            )
        owners[tensor] = shards[name]
    return owners


def _shard_name(name: object) -> str:
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or len(name) > 255
        or any(sign in name for sign in ("/", "\\", "\0"))
    ):
        raise ModelError(f"{INDEX_FILE}: file {shorten(name)}", "bare names of .safetensors files beside it")
    return name


def _no_weights(directory: Path) -> tuple[str, str]:
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except OSError as error:
        return f"{directory}: {error.strerror}", "a readable directory"
    supported = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"only pickled weights in {directory}: {shorten(pickles)}",
            supported + " (pickle can run code and is never loaded; save with safe_serialization=True)",
        )
    return f"{directory} without weights", supported
