"""The forward pass as data: a flat list of op records over named buffers.

A family (`models/`) emits the records once at load through a `ProgramBuilder` (builder.py); a backend walks the
list each step. Every record states the arithmetic that it stands for and where values are rounded, so that a backend
has nothing to decide. Buffers hold one row per row of the token batch.

```
Embed -> x
per layer:  RMSNorm(x) -> h   Linear(h) -> qkv   RopeStore(qkv) -> q, KV pool   Attention(q, KV pool) -> a
            Linear(a) += x    RMSNorm(x) -> h    Linear(h), silu_mul -> m       Linear(m) += x
RMSNorm(x) -> h;  Head(h): logits of the rows that need them
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SPLIT = 128
"""Keys per split of attention: a constant of the numerics contract."""

BufferDtype = Literal["float32", "activation"]
Epilogue = Literal["none", "silu_mul", "gelu_mul", "gelu", "relu", "residual"]
PAIRED: tuple[Epilogue, ...] = ("silu_mul", "gelu_mul")
"""Epilogues that make one number of a gate and an up column."""


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A named array of `width` elements per row.

    dtype "float32" is exact; "activation" is rounded to the activation format of the executor when it is
    written (bfloat16: round to nearest even; float32: not at all). A buffer lives for one step unless `kept`
    (saved activations of tuning).
    """

    name: str
    width: int
    dtype: BufferDtype = "float32"
    kept: bool = False


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight as the program wants it: `shape` [out, in] for linears, [n] for vectors.

    `sources` are the Hugging Face tensors that are concatenated along axis 0. `transposed`: the checkpoint
    stores [in, out]. `optional`: a checkpoint may lack it, and the loader then leaves it out (biases only:
    the op runs without it). `offset` is added in fp32 (norms that are stored less one; vectors only).
    `integers`: int32 (orders of `Gather` only). `input_order` names the order that the columns of a linear lie in:
    its source must have been gathered by it.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    optional: bool = False
    transposed: bool = False
    offset: float = 0.0
    integers: bool = False
    input_order: str | None = None


@dataclass(frozen=True, slots=True)
class Embed:
    """out[row] = weight[token_ids[row]] * scale in fp32 (exact where scale is 1)."""

    weight: str
    out: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class EmbedPositions:
    """out[row] += weight[positions[row] + offset] in fp32: learned positions."""

    weight: str
    out: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Cast:
    """out = source (fp32), rounded to the dtype of `out`. With `add`, source += add (stored) comes first."""

    source: str
    out: str
    add: str | None = None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """out = d * (1 / sqrt(mean(d^2) + epsilon)) * weight + bias with d = source - mean(source), in fp32, rounded
    to the dtype of `out` (Ba et al. 2016)."""

    source: str
    weight: str
    out: str
    epsilon: float
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """out = (source * (1 / sqrt(mean(source^2) + epsilon))) * weight, in fp32, rounded to the dtype of `out`.

    With `add`, source += add (fp32, stored) comes first. Root mean square layer normalisation, Zhang and
    Sennrich 2019.
    """

    source: str
    weight: str
    out: str
    epsilon: float
    add: str | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """y = source @ weight.T, one fp32 accumulator per element, + bias, + delta, then the epilogue in fp32.

    none: out = y. residual: out += y * scale (the product rounded, and left out where scale is 1). silu_mul:
    weight stacks gate and up, y = [g, u] and out = (g / (1 + exp(-g))) * u, half as wide. gelu_mul: likewise
    with gelu of g in its tanh form (Hendrycks and Gimpel 2016). gelu, relu: out = that of y. The result is
    rounded once to the dtype of `out`. `delta` names an fp32 buffer as wide as y (an adapter's product); it is
    added before the epilogue.
    """

    source: str
    weight: str
    out: str
    bias: str | None = None
    epilogue: Epilogue = "none"
    delta: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Gather:
    """out[row, i] = source[row, order[i]]: a copy of an activation in another order of its elements."""

    source: str
    order: str
    out: str


@dataclass(frozen=True, slots=True)
class RopeStore:
    """Split qkv = [q heads | k heads | v heads], rotate q and k, store k and v in the KV pool.

    The leading `rotary_dim` dimensions of a head rotate in halves (x1, x2):
    (x1 * cos - x2 * sin, x2 * cos + x1 * sin), each product and the sum rounded to fp32 (RoFormer, Su et al.
    2021, in the half-split layout of Hugging Face). `q_norm` and `k_norm` name weights of an RMSNorm before the
    rotation: [head_dim] over each head, or [heads * head_dim] over all heads of q or k together. `table` says
    which of the RoPE tables turns this layer. q goes to `out` in fp32; k and v are rounded once to the KV
    dtype. A stored value that is not finite is replaced (NaN by 0, infinities by the largest number), so that
    a broken request cannot poison a page that another one gets later.
    """

    source: str
    out: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    q_norm: str | None = None
    k_norm: str | None = None
    epsilon: float = 0.0
    table: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """out = softmax(q . k) . v over the keys that a row sees, in splits of `SPLIT` keys of its path.

    q is multiplied by `scale` (one fp32 rounding) before the dot products. Per split: m = max of scores,
    p = exp(score - m), l = sum of p, o = p @ v; splits merge in order by
    (m, l, o) <- (m', l e^(m-m') + l_s e^(m_s-m'), o e^(m-m') + o_s e^(m_s-m')) with m' = max(m, m_s), and
    out = o / l, rounded once (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).
    `window` w: a row sees only its last w keys, itself included. `softcap` c: a score s becomes
    c * tanh(s / c) before anything else (Gemma 2).
    """

    source: str
    out: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


Op = Embed | EmbedPositions | Cast | LayerNorm | RMSNorm | Linear | Gather | RopeStore | Attention


@dataclass(frozen=True, slots=True)
class Head:
    """logits = source @ weight.T in fp32 for the rows that need them, divided by `divisor` (where it is not 1);
    softcap c: c * tanh(logits / c)."""

    source: str
    weight: str
    softcap: float | None = None
    divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """What one token leaves in the KV pool; a page is [layers, 2 (K, V), kv_heads, 16, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def page_elements(self, page_size: int = 16) -> int:
        """Elements of one page of `page_size` slots."""
        return self.num_layers * 2 * self.num_kv_heads * page_size * self.head_dim


@dataclass(frozen=True, slots=True)
class Program:
    """One forward pass; `check()` states which programs are legal."""

    ops: tuple[Op, ...]
    head: Head
    buffers: tuple[BufferSpec, ...]
    weights: tuple[WeightSpec, ...]
    kv: KVGeometry
    vocab_size: int

    @property
    def num_rope_tables(self) -> int:
        """How many RoPE tables there must be, one behind the other."""
        return 1 + max((op.table for op in self.ops if isinstance(op, RopeStore)), default=0)

    def check(self) -> None:
        """Raise ValueError unless every name is known, every buffer is written before it is read, and all
        shapes agree."""
        _check(self)


class _Checker:
    """Walks the ops in order and remembers what has been written."""

    def __init__(self, program: Program) -> None:
        self.kv = program.kv
        self.vocab_size = program.vocab_size
        self.widths = {spec.name: spec.width for spec in program.buffers}
        self.float32 = {spec.name for spec in program.buffers if spec.dtype == "float32"}
        self.shapes = {spec.name: spec.shape for spec in program.weights}
        self.optional = {spec.name for spec in program.weights if spec.optional}
        self.integers = {spec.name for spec in program.weights if spec.integers}
        self.input_orders = {spec.name: spec.input_order for spec in program.weights}
        self.gathered: dict[str, str] = {}
        self.written: set[str] = set()
        self.stored: set[int] = set()
        self.biases: set[str] = set()
        _distinct("buffer", [spec.name for spec in program.buffers])
        _distinct("weight", [spec.name for spec in program.weights])
        for spec in program.weights:
            if spec.offset and len(spec.shape) != 1:
                raise ValueError(f"weight {spec.name} of shape {spec.shape} has an offset")
            if not spec.sources or not spec.shape or min(spec.shape) < 1:
                raise ValueError(f"weight {spec.name} has shape {spec.shape} and sources {spec.sources}")

    def read(self, name: str, width: int | None = None) -> int:
        """The width of a buffer that must have been written (and be `width` wide)."""
        found = self.width(name)
        if name not in self.written:
            raise ValueError(f"buffer {name} is read before it is written")
        if width is not None and found != width:
            raise ValueError(f"buffer {name} is {found} wide, but {width} is needed")
        return found

    def write(self, name: str, width: int) -> None:
        if self.width(name) != width:
            raise ValueError(f"buffer {name} is {self.width(name)} wide, but {width} is written")
        self.written.add(name)
        self.gathered.pop(name, None)

    def width(self, name: str) -> int:
        if name not in self.widths:
            raise ValueError(f"unknown buffer {name}")
        return self.widths[name]

    def weight(self, name: str, *shape: int, integers: bool = False) -> tuple[int, ...]:
        """The shape of a weight; -1 in `shape` matches anything."""
        found = self.shapes.get(name)
        if found is None:
            raise ValueError(f"unknown weight {name}")
        if len(found) != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, found, strict=True)
        ):
            raise ValueError(f"weight {name} has shape {found}, but {shape} is needed")
        if (name in self.integers) != integers:
            raise ValueError(f"weight {name} must be {'integers' if integers else 'floats'}")
        return found

    def exact(self, name: str, what: str) -> None:
        if name not in self.float32:
            raise ValueError(f"buffer {name} must be float32: {what}")

    def embed(self, op: Embed) -> None:
        _, width = self.weight(op.weight, self.vocab_size, -1)
        self.write(op.out, width)

    def embed_positions(self, op: EmbedPositions) -> None:
        rows, _ = self.weight(op.weight, -1, self.read(op.out))
        self.exact(op.out, "positions are added to it")
        if not 0 <= op.offset < rows:
            raise ValueError(f"positions from {op.offset} on lie outside of {op.weight}")

    def cast(self, op: Cast) -> None:
        self.exact(op.source, "it is rounded")
        width = self.read(op.source)
        if op.add is not None:
            self.read(op.add, width)
        self.write(op.out, width)

    def layer_norm(self, op: LayerNorm) -> None:
        width = self.read(op.source)
        self.exact(op.source, "it is normed")
        self.weight(op.weight, width)
        if op.bias is not None:
            self.weight(op.bias, width)
        self.write(op.out, width)

    def rms_norm(self, op: RMSNorm) -> None:
        width = self.read(op.source)
        if op.add is not None:
            self.read(op.add, width)
            self.exact(op.source, "it is a residual stream")
        self.weight(op.weight, width)
        self.write(op.out, width)

    def linear(self, op: Linear) -> None:
        rows, _ = self.weight(op.weight, -1, self.read(op.source))
        self.ordered(op.weight, op.source)
        if op.source in self.float32:
            raise ValueError(f"buffer {op.source} must be an activation: it goes into a linear")
        if op.bias is not None:
            self.weight(op.bias, rows)
            self.biases.add(op.bias)
        if op.delta is not None:
            self.read(op.delta, rows)
            self.exact(op.delta, "it is an adapter's product")
        if op.out == op.source:
            raise ValueError(f"linear over {op.weight} reads and writes {op.out}")
        if op.epilogue == "residual":
            self.read(op.out, rows)
            self.exact(op.out, "it is a residual stream")
        elif op.epilogue in PAIRED and rows % 2:
            raise ValueError(f"weight {op.weight} has {rows} rows, which are no gate and up pair")
        if op.scale != 1 and op.epilogue != "residual":
            raise ValueError(f"linear over {op.weight} scales what is no residual")
        self.write(op.out, rows // 2 if op.epilogue in PAIRED else rows)

    def ordered(self, weight: str, source: str) -> None:
        if self.input_orders[weight] != self.gathered.get(source):
            raise ValueError(f"weight {weight} has its columns in another order than buffer {source}")

    def gather(self, op: Gather) -> None:
        width = self.read(op.source)
        self.weight(op.order, width, integers=True)
        if op.out == op.source or {op.source, op.out} & self.float32:
            raise ValueError(f"a gather reads {op.source} and writes {op.out}, which must be two activations")
        if op.source in self.gathered:
            raise ValueError(f"buffer {op.source} is gathered twice")
        self.write(op.out, width)
        self.gathered[op.out] = op.order

    def rope_store(self, op: RopeStore) -> None:
        self.heads(op)
        self.read(op.source, (op.num_heads + 2 * op.num_kv_heads) * op.head_dim)
        if op.rotary_dim % 2 or not 0 <= op.rotary_dim <= op.head_dim:
            raise ValueError(f"rotary_dim {op.rotary_dim} must be even and at most {op.head_dim}")
        for norm, heads in ((op.q_norm, op.num_heads), (op.k_norm, op.num_kv_heads)):
            if norm is not None and self.shapes.get(norm) != (heads * op.head_dim,):
                self.weight(norm, op.head_dim)
        self.exact(op.out, "q is not rounded")
        self.write(op.out, op.num_heads * op.head_dim)
        if op.layer in self.stored:
            raise ValueError(f"layer {op.layer} is stored twice")
        self.stored.add(op.layer)

    def attention(self, op: Attention) -> None:
        self.heads(op)
        if op.layer not in self.stored:
            raise ValueError(f"layer {op.layer} is attended to before it is stored")
        if op.window is not None and op.window < 1:
            raise ValueError(f"window {op.window} shows no key")
        self.read(op.source, op.num_heads * op.head_dim)
        self.write(op.out, op.num_heads * op.head_dim)

    def heads(self, op: RopeStore | Attention) -> None:
        if (op.num_kv_heads, op.head_dim) != (self.kv.num_kv_heads, self.kv.head_dim):
            raise ValueError(f"layer {op.layer} has other heads than the KV pool {self.kv}")
        if not 0 <= op.layer < self.kv.num_layers:
            raise ValueError(f"layer {op.layer} lies outside the KV pool of {self.kv.num_layers} layers")
        if op.num_heads % op.num_kv_heads:
            raise ValueError(f"{op.num_heads} heads cannot share {op.num_kv_heads} KV heads")


def _check(program: Program) -> None:
    checker = _Checker(program)
    for op in program.ops:
        if isinstance(op, Embed):
            checker.embed(op)
        elif isinstance(op, EmbedPositions):
            checker.embed_positions(op)
        elif isinstance(op, Cast):
            checker.cast(op)
        elif isinstance(op, LayerNorm):
            checker.layer_norm(op)
        elif isinstance(op, RMSNorm):
            checker.rms_norm(op)
        elif isinstance(op, Linear):
            checker.linear(op)
        elif isinstance(op, Gather):
            checker.gather(op)
        elif isinstance(op, RopeStore):
            checker.rope_store(op)
        else:
            checker.attention(op)
    if checker.stored != set(range(program.kv.num_layers)):
        raise ValueError(
            f"layers {sorted(checker.stored)} are stored, but the KV pool has {program.kv.num_layers}"
        )
    checker.weight(program.head.weight, program.vocab_size, checker.read(program.head.source))
    checker.ordered(program.head.weight, program.head.source)
    if not checker.optional <= checker.biases:
        raise ValueError(f"only biases may be optional: {sorted(checker.optional - checker.biases)}")


def _distinct(kind: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a {kind} name stands twice in {names}")
