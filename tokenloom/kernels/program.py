"""The forward pass as data: a flat list of op records over named buffers.

A family (`models/`) emits the records once at load through a `ProgramBuilder` (builder.py); a backend walks the
list each step. Every record states the arithmetic that it stands for and where values are rounded, so that a backend
has nothing to decide. Buffers hold one row per row of the token batch.

```
Embed -> x
per layer:  RMSNorm(x) -> h   Linear(h) -> qkv   RopeStore(qkv) -> q, KV pool   Attention(q, KV pool) -> a
            Linear(a) += x    RMSNorm(x) -> h    Linear(h), silu_mul -> m       Linear(m) += x
            (or, with experts: Linear(h) -> r   Route(r) -> s   Experts(h, s) += x)
RMSNorm(x) -> h;  Head(h): logits of the rows that need them
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SPLIT = 128
"""Keys per split of attention: a constant of the numerics contract."""

MAX_EXPERTS = 1024
MAX_CHOSEN = 64
"""How many experts there are, and a row goes to, at most."""

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
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    optional: bool = False
    transposed: bool = False
    offset: float = 0.0


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
    """y = source @ weight.T, one fp32 accumulator per element, + bias, + update, then the epilogue in fp32.

    none: out = y. residual: out += y * scale (the product rounded, and left out where scale is 1). silu_mul:
    weight stacks gate and up, y = [g, u] and out = (g / (1 + exp(-g))) * u, half as wide. gelu_mul: likewise
    with gelu of g in its tanh form (Hendrycks and Gimpel 2016). gelu, relu: out = that of y. The result is
    rounded once to the dtype of `out`.

    A row whose sequence has an adapter is updated by each of the adapter's blocks for the weight (LoRA, Hu et al.
    2021): y[begin:end] += v @ b.T in fp32 with v = scale * (source @ a.T). A product with a row of `a` is summed in
    16 lanes along the inputs, one with `b` by a chain of fused steps along the ranks. Rows without an adapter have
    the bits that they would have alone. The head is updated likewise, and `Embed` by scale * a[:, token] @ b.T.
    """

    source: str
    weight: str
    out: str
    bias: str | None = None
    epilogue: Epilogue = "none"
    scale: float = 1.0


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


@dataclass(frozen=True, slots=True)
class Route:
    """Chooses the `top_k` experts of each row: out [2 top_k] = their weights, then their numbers.

    e = exp(source - max(source)) in fp32. The largest `top_k` of source are chosen in falling order, ties to the
    lowest number. A weight is e / sum(e) over all experts; `normalized`: over the chosen ones, added in that order
    (Shazeer et al. 2017; Switch transformers, Fedus et al. 2022).
    """

    source: str
    out: str
    top_k: int
    normalized: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """A gated MLP of each expert over the rows that were routed to it: out += w * (h @ down.T) for the experts of
    a row in the order of their numbers.

    h is the `Linear` of source and the expert's gate_up with its paired `epilogue`, rounded to the activation
    format. The product with down, that with w and the sum are fp32. `routes` is what `Route` wrote; `gate_up` and
    `down` name one weight for each expert.
    """

    source: str
    routes: str
    out: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]
    epilogue: Epilogue = "silu_mul"


Op = Embed | EmbedPositions | Cast | LayerNorm | RMSNorm | Linear | RopeStore | Attention | Route | Experts


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

    def products(self) -> Iterator[tuple[str, bool]]:
        """The weight of each product in order, the head's last, and whether it is of gate and up pairs."""
        for op in self.ops:
            if isinstance(op, Linear):
                yield op.weight, op.epilogue in PAIRED
            elif isinstance(op, Experts):
                yield from ((name, True) for name in op.gate_up)
                yield from ((name, False) for name in op.down)
        yield self.head.weight, False

    def routers(self) -> set[str]:
        """Weights whose products choose experts."""
        scores = {op.source for op in self.ops if isinstance(op, Route)}
        return {op.weight for op in self.ops if isinstance(op, Linear) and op.out in scores}

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
        self.written: set[str] = set()
        self.stored: set[int] = set()
        self.biases: set[str] = set()
        self.routed: dict[str, int] = {}
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

    def width(self, name: str) -> int:
        if name not in self.widths:
            raise ValueError(f"unknown buffer {name}")
        return self.widths[name]

    def weight(self, name: str, *shape: int) -> tuple[int, ...]:
        """The shape of a weight; -1 in `shape` matches anything."""
        found = self.shapes.get(name)
        if found is None:
            raise ValueError(f"unknown weight {name}")
        if len(found) != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, found, strict=True)
        ):
            raise ValueError(f"weight {name} has shape {found}, but {shape} is needed")
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
        if op.source in self.float32:
            raise ValueError(f"buffer {op.source} must be an activation: it goes into a linear")
        if op.bias is not None:
            self.weight(op.bias, rows)
            self.biases.add(op.bias)
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

    def route(self, op: Route) -> None:
        self.exact(op.source, "experts are chosen by it")
        if not 1 <= op.top_k <= min(self.read(op.source), MAX_CHOSEN):
            raise ValueError(
                f"{op.top_k} of {self.read(op.source)} experts; there are 1 to all, at most {MAX_CHOSEN}"
            )
        if self.width(op.source) > MAX_EXPERTS:
            raise ValueError(f"{self.width(op.source)} experts; there are up to {MAX_EXPERTS}")
        self.exact(op.out, "it holds numbers of experts")
        self.write(op.out, 2 * op.top_k)
        self.routed[op.out] = self.width(op.source)

    def experts(self, op: Experts) -> None:
        if self.read(op.routes) and self.routed.get(op.routes) != len(op.gate_up):
            raise ValueError(f"{op.routes} is no choice of {len(op.gate_up)} experts")
        if len(op.down) != len(op.gate_up) or op.epilogue not in PAIRED:
            raise ValueError(f"experts over {op.source} lack a weight, or their epilogue is {op.epilogue}")
        width = self.read(op.source)
        if op.source in self.float32:
            raise ValueError(f"buffer {op.source} must be an activation: it goes into a product")
        self.exact(op.out, "it is a residual stream")
        rows = {self.weight(name, -1, width)[0] for name in op.gate_up}
        if len(rows) != 1 or (hidden := rows.pop()) % 2:
            raise ValueError(f"experts over {op.source} are of different sizes, or no gate and up pairs")
        for name in op.down:
            self.weight(name, self.read(op.out), hidden // 2)

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
        elif isinstance(op, RopeStore):
            checker.rope_store(op)
        elif isinstance(op, Route):
            checker.route(op)
        elif isinstance(op, Experts):
            checker.experts(op)
        else:
            checker.attention(op)
    if checker.stored != set(range(program.kv.num_layers)):
        raise ValueError(
            f"layers {sorted(checker.stored)} are stored, but the KV pool has {program.kv.num_layers}"
        )
    checker.weight(program.head.weight, program.vocab_size, checker.read(program.head.source))
    if not checker.optional <= checker.biases:
        raise ValueError(f"only biases may be optional: {sorted(checker.optional - checker.biases)}")


def _distinct(kind: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a {kind} name stands twice in {names}")
