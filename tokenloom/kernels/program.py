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
Epilogue = Literal["none", "silu_mul", "gelu_mul", "gelu", "gelu_erf", "relu", "residual"]
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
    `interleaved`: the rows of the one source lie in groups, each of so many rows of every part; the weight has them
    part by part ((d, d, d): q, k and v of one head after the other, as a fused tensor may have them).
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
    interleaved: tuple[int, ...] = ()


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
    with gelu of g in its tanh form (Hendrycks and Gimpel 2016). gelu, gelu_erf, relu: out = that of y, gelu_erf
    being the exact form, y times the normal distribution function of y. The result is rounded once to the dtype of
    `out`.

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


Op = (
    Embed
    | EmbedPositions
    | Cast
    | LayerNorm
    | RMSNorm
    | Linear
    | Gather
    | RopeStore
    | Attention
    | Route
    | Experts
)


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
    """One forward pass; `program_check` states which programs are legal."""

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
