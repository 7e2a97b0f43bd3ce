"""The tensors of a GGUF file under the names and in the form of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tokenloom.errors import ModelError, shorten
from tokenloom.gguf.file import GgufFile
from tokenloom.gguf.header import TensorInfo
from tokenloom.models.checkpoint import FULL_HASH_BYTES, samples
from tokenloom.models.gguf_config import read_gguf_config
from tokenloom.models.gguf_names import NAMINGS, ROPE_FACTORS
from tokenloom.quantization.gguf_blocks import BlockMatrix, check_available

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_Float = Literal["float32", "bfloat16", "float16"]
_FLOATS: Final[Mapping[str, _Float]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _Part(NamedTuple):
    """A tensor of the file, or the matrix of one expert in it."""

    tensor: str
    info: TensorInfo


class GgufCheckpoint:
    """A `WeightFiles` over one GGUF file. Use `GgufCheckpoint.open`; a context manager.

    Tensors are handed out as Hugging Face would store them: q and k of Llama in plain order, the norms of Gemma
    without their 1, the linears of GPT-2 as [in, out], a stack of experts as a matrix for each. Matrices in blocks are
    `BlockMatrix`, [N, K] always.
    """

    quantization: Final = None

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.directory = file.path
        self.config: Mapping[str, Any] = read_gguf_config(file)
        self._naming = NAMINGS[file.text("general.architecture")]
        self._parts: dict[str, _Part] = {}
        experts = self.config.get("num_experts", 0)
        for theirs, info in file.tensors.items():
            if theirs in ROPE_FACTORS:
                continue
            names = self._naming.expert_names(theirs, experts)
            parts = _split(info, experts, f"{file.path}: {theirs}") if names else [info]
            for name, part in zip(names or [self._naming.name(theirs)], parts, strict=True):
                if name in self._parts:
                    raise ModelError(
                        f"{file.path}: {theirs} beside {self._parts[name].tensor}", "one of them"
                    )
                self._parts[name] = _Part(theirs, part)

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Map the file and check its header; no tensor is read. Raises `ModelError`, and `UnsupportedFeature` where
        the `gguf` package is missing."""
        check_available()
        file = GgufFile(path)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted; those that no family has keep the name of the file."""
        return tuple(sorted(self._parts))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """As Hugging Face has it, without reading the tensor."""
        shape = self._info(name).shape
        return shape[::-1] if self._is_turned(name) else shape

    def dtype(self, name: str) -> str:
        """float32, bfloat16 or float16; blocks are widened to float32."""
        kind = self._info(name).kind
        return _FLOATS[kind.name] if kind.is_plain else "float32"

    @property
    def main_dtype(self) -> _Float:
        """The float type that most bytes of matrices are stored in; float32 where any are in blocks, whose values
        are of that type."""
        totals = dict.fromkeys(_FLOATS, 0)
        for info in self._file.tensors.values():
            if not info.kind.is_plain:
                return "float32"
            if len(info.shape) > 1:
                totals[info.kind.name] += info.end - info.begin
        return _FLOATS[max(totals, key=lambda name: totals[name])]

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor as an array: a read-only view where it is stored so, else a copy."""
        found = self.source(name)
        if isinstance(found, BlockMatrix):
            return found.dequantize().T if self._is_turned(name) else found.dequantize()
        return found

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system once it has been converted."""
        self._file.release(self._info(name))

    def source_tensors(self, source: str) -> tuple[str, ...]:
        """The tensor itself; none if it is not there."""
        return (source,) if source in self else ()

    def linear_format(self, source: str) -> None:
        """None: no linear is stored in several parts."""

    def input_order(self, source: str) -> None:
        """None: inputs are in order."""

    def source_form(self, source: str) -> tuple[str, int]:
        """Type of the values, and 0."""
        return self.dtype(source), 0

    def blocks(self, source: str) -> BlockMatrix | None:
        """The matrix in blocks that `source` is, rows as they lie in the file; None if it is none."""
        if source not in self:
            return None
        info = self._info(source)
        if info.kind.is_plain or len(info.shape) != 2:
            return None
        return BlockMatrix(self._file.read(info).reshape(info.shape[0], -1), info.kind, source)

    def source_shape(self, source: str) -> tuple[int, ...]:
        """[N, K] for blocks, else the shape."""
        return self.shape(source) if self.blocks(source) is None else self._info(source).shape

    def source_bytes(self, source: str) -> int:
        """Bytes as stored; 0 if it is not there."""
        return self._info(source).end - self._info(source).begin if source in self else 0

    def source(self, source: str) -> NDArray[Any] | BlockMatrix:
        """The tensor `source`: blocks as they are, anything else as an array."""
        info = self._info(source)
        theirs = self._parts[source].tensor
        blocks = self.blocks(source)
        if blocks is not None:
            if self._naming.is_interleaved(theirs):
                return BlockMatrix(self._in_order(blocks.data, theirs), info.kind, source)
            return blocks
        if not info.kind.is_plain:
            flat = BlockMatrix(self._file.read(info)[None], info.kind, source)
            return flat.dequantize().reshape(info.shape)
        values = self._file.read(info).view(_DTYPES[info.kind.name]).reshape(info.shape)
        if self._naming.is_interleaved(theirs):
            return self._in_order(values, theirs)
        offset = self._naming.offset(theirs)
        if offset:
            return values.astype(np.float32) - np.float32(offset)
        return values.T if self._is_turned(source) else values

    def release_source(self, source: str) -> None:
        """As `release`."""
        self.release(source)

    def content_id(self) -> str:
        """Hex blake2b (128 bits) of the header and of the tensors' bytes, by the rule of `Checkpoint.content_id`."""
        hasher = hashlib.blake2b(b"tokenloom.gguf.1\n", digest_size=16)
        hasher.update(self._file.header_bytes)
        total = sum(info.end - info.begin for info in self._file.tensors.values())
        for _, info in sorted(self._file.tensors.items()):
            for sample in samples(self._file.read(info), total <= FULL_HASH_BYTES):
                hasher.update(sample.data)
            self._file.release(info)
        return hasher.hexdigest()

    def files_id(self) -> str:
        """Hex blake2b (128 bits) of name, size and modification time of the file."""
        stamp = [self._file.path.name, self._file.size, self._file.mtime_ns]
        return hashlib.blake2b(json.dumps(stamp).encode("ascii"), digest_size=16).hexdigest()

    def close(self) -> None:
        """Unmap the file; while views are held, it stays mapped until the last one goes."""
        self._file.close()

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._parts:
            raise ModelError(f"no tensor {shorten(name)} in {self.directory}", "the tensors listed in it")
        return self._parts[name].info

    def _is_turned(self, name: str) -> bool:
        return self._naming.is_turned(self._parts[name].tensor)

    def _in_order(self, values: NDArray[Any], theirs: str) -> NDArray[Any]:
        """Rows of q or k from neighbours (0, h, 1, h + 1, ...) to halves (0, 1, ..., h, h + 1, ...) in each head."""
        heads = "num_attention_heads" if ".attn_q." in theirs else "num_key_value_heads"
        pairs, remainder = divmod(len(values), 2 * self.config[heads])
        if remainder:
            raise ModelError(
                f"{self.directory}: {theirs} of {len(values)} rows", f"{self.config[heads]} heads"
            )
        rows = values.reshape(self.config[heads], pairs, 2, *values.shape[1:])
        return rows.swapaxes(1, 2).reshape(values.shape)


def _split(stack: TensorInfo, count: int, where: str) -> list[TensorInfo]:
    """The matrices [N, K] of a stack [count, N, K]."""
    if len(stack.shape) != 3 or stack.shape[0] != count:
        raise ModelError(f"{where} of shape {list(stack.shape)}", f"a stack of {count} matrices")
    size = (stack.end - stack.begin) // count
    begins = range(stack.begin, stack.end, size)
    return [TensorInfo(stack.kind, stack.shape[1:], begin, begin + size) for begin in begins]
