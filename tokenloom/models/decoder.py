"""The decoder layer that most families share: a norm before attention and one before an MLP.

Families differ in biases, norms of q and k, windows, factors and caps, in whether the MLP has a gate, and in how
their tensors are called and fused (`Names`). `Blocks` emits the two halves of a layer; `build` puts them together as
Llama does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.program import Epilogue, KVGeometry, Program
from tokenloom.models.config import Activation, ModelConfig

_GATED: Mapping[Activation, Epilogue] = {"silu": "silu_mul", "gelu": "gelu_mul"}
_PLAIN: Mapping[Activation, Epilogue] = {"gelu": "gelu", "gelu_erf": "gelu_erf", "relu": "relu"}


class Names(NamedTuple):
    """What a checkpoint calls its tensors, less `.weight` and `.bias`; `qkv` to `down` come behind `layers` and the
    number of the layer.

    `qkv` and `up` (gate and up where the MLP has a gate) are the tensors that are stacked, or the one that holds
    them all. `by_head`: that of `qkv` has q, k and v head by head, or, where heads share k and v, what belongs to one
    k and v after the other.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    by_head: bool = False
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    last_norm: str = "model.norm"
    head: str = "lm_head"


LLAMA_NAMES = Names()


class Blocks:
    """Emits the ops of one model, whose tensors are called `names`."""

    def __init__(self, config: ModelConfig, names: Names = LLAMA_NAMES) -> None:
        self.config = config
        self.names = names
        self.b = ProgramBuilder(
            KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim), config.vocab_size
        )
        self.x = self.b.buffer("x", config.hidden_size)
        self.normed = self.b.buffer("normed", config.hidden_size, "activation")

    def embed(self) -> None:
        """x = the embedding of each token."""
        self.b.embed(self._embedding(), self.x, scale=self.config.embedding_scale)

    def norm(self, name: str, source: str, out: str, *, add: str | None = None) -> None:
        """out = norm of source, to which `add` is added before (no LayerNorm)."""
        if self.config.layer_norm:
            bias = self.b.weight(f"{name}.bias", self._width())
            weight = self._norm_weight(name, self._width())
            self.b.layer_norm(source, weight, out, self.config.rms_norm_eps, bias=bias)
            return
        self.b.rms_norm(
            source, self._norm_weight(name, self._width()), out, self.config.rms_norm_eps, add=add
        )

    def attention(self, layer: int, out: str, *, residual: bool = True) -> None:
        """Attention over `normed`; what comes out of it is added to `out`, or written there."""
        c, b, names, p = self.config, self.b, self.names, self.layer(layer)
        qkv = b.buffer("qkv", c.q_size + 2 * c.kv_size)
        q = b.buffer("q", c.q_size)
        attended = b.buffer("attended", c.q_size, "activation")
        widths = (c.q_size, c.kv_size) if c.qk_norm == "all" else (c.head_dim, c.head_dim)
        norms = [
            self._norm_weight(f"{p}self_attn.{name}_norm", width)
            for name, width in zip("qk", widths, strict=True)
            if c.qk_norm != "none"
        ]
        window = c.window(layer)
        rows = c.q_size + 2 * c.kv_size
        parts = (c.q_size // c.num_kv_heads, c.head_dim, c.head_dim) if names.by_head else ()
        tensors = [p + name for name in names.qkv]
        weight = b.weight(_with(tensors, "weight"), rows, self._width(), interleaved=parts)
        bias = b.weight(_with(tensors, "bias"), rows, interleaved=parts) if c.attention_bias else None
        b.linear(self.normed, weight, qkv, bias=bias)
        b.rope_store(
            qkv,
            q,
            layer=layer,
            num_heads=c.num_heads,
            rotary_dim=c.rope.rotary_dim,
            norms=(norms[0], norms[1]) if norms else None,
            epsilon=c.rms_norm_eps if norms else 0.0,
            table=1 if c.local_rope is not None and window is not None else 0,
        )
        b.attention(
            q,
            attended,
            layer=layer,
            num_heads=c.num_heads,
            scale=c.query_scale,
            window=window,
            softcap=c.attention_softcap,
        )
        self._project(attended, p + names.out, out, c.output_bias, residual)

    def mlp(self, layer: int, out: str, *, source: str | None = None, residual: bool = True) -> None:
        """The MLP over `source` (None: `normed`), likewise."""
        c, p = self.config, self.layer(layer)
        inner = self.b.buffer("inner", c.intermediate_size, "activation")
        names = [p + name for name in self.names.up]
        rows = (2 if c.gated else 1) * c.intermediate_size
        weight = self.b.weight(_with(names, "weight"), rows, self._width())
        bias = self.b.weight(_with(names, "bias"), rows) if c.mlp_bias else None
        epilogue = gated_epilogue(c.activation) if c.gated else plain_epilogue(c.activation)
        self.b.linear(source or self.normed, weight, inner, bias=bias, epilogue=epilogue)
        self._project(inner, p + self.names.down, out, c.mlp_bias, residual)

    def experts(self, layer: int, out: str, prefix: str, names: Sequence[str]) -> None:
        """A mixture of experts over `normed`, added to `out`. `names` are those of gate, up and down."""
        c, b, p = self.config, self.b, f"{self.layer(layer)}{prefix}."
        e = c.experts
        if e is None:
            raise ValueError("a model without experts")
        scores, routes = b.buffer("scores", e.count), b.buffer("routes", 2 * e.top_k)
        b.linear(self.normed, b.weight(f"{p}gate.weight", e.count, self._width()), scores)
        b.route(scores, routes, top_k=e.top_k, normalized=e.normalized)
        each = [f"{p}experts.{i}." for i in range(e.count)]
        gate, up, down = names
        b.experts(
            self.normed,
            routes,
            [b.weight((f"{q}{gate}.weight", f"{q}{up}.weight"), 2 * e.width, self._width()) for q in each],
            [b.weight(f"{q}{down}.weight", self._width(), e.width) for q in each],
            out,
            epilogue=gated_epilogue(c.activation),
        )

    def finish(self) -> Program:
        """The last norm and the head."""
        self.norm(self.names.last_norm, self.x, self.normed)
        return self.head()

    def head(self) -> Program:
        """The program, whose logits are those of `normed`."""
        c = self.config
        head = (
            self._embedding()
            if c.tie_word_embeddings
            else self.b.weight(f"{self.names.head}.weight", c.vocab_size, self._width())
        )
        return self.b.finish(self.normed, head, softcap=c.logits_softcap, divisor=c.logits_divisor)

    def layer(self, layer: int) -> str:
        """What the names of the tensors of a layer begin with."""
        return f"{self.names.layers}{layer}."

    def _width(self) -> int:
        return self.config.hidden_size

    def _embedding(self) -> str:
        return self.b.weight(f"{self.names.embedding}.weight", self.config.vocab_size, self._width())

    def _norm_weight(self, name: str, width: int) -> str:
        return self.b.weight(f"{name}.weight", width, offset=self.config.norm_offset)

    def _project(self, source: str, name: str, out: str, has_bias: bool, residual: bool) -> None:
        """Back to the width of the residual stream."""
        weight = self.b.weight(f"{name}.weight", self._width(), self.b.width(source))
        bias = self.b.weight(f"{name}.bias", self._width()) if has_bias else None
        if residual:
            self.b.linear(
                source, weight, out, bias=bias, epilogue="residual", scale=self.config.residual_scale
            )
        else:
            self.b.linear(source, weight, out, bias=bias)


def build(
    config: ModelConfig,
    names: Names = LLAMA_NAMES,
    *,
    experts: tuple[str, Sequence[str]] = ("mlp", ("gate_proj", "up_proj", "down_proj")),
) -> Program:
    """The forward pass of a model of such layers. `experts`: where a layer has them, and how the parts of one are
    called."""
    blocks = Blocks(config, names)
    blocks.embed()
    for layer in range(config.num_layers):
        p = blocks.layer(layer)
        blocks.norm(p + "input_layernorm", blocks.x, blocks.normed)
        blocks.attention(layer, blocks.x)
        blocks.norm(p + "post_attention_layernorm", blocks.x, blocks.normed)
        if config.experts is not None and layer not in config.experts.dense_layers:
            blocks.experts(layer, blocks.x, *experts)
        else:
            blocks.mlp(layer, blocks.x)
    return blocks.finish()


def gated_epilogue(activation: Activation) -> Epilogue:
    """Of an MLP with a gate. Raises ValueError for an activation that has none."""
    if activation not in _GATED:
        raise ValueError(f"no gate with {activation}")
    return _GATED[activation]


def plain_epilogue(activation: Activation) -> Epilogue:
    """Of an MLP without a gate. Raises ValueError for an activation that has none."""
    if activation not in _PLAIN:
        raise ValueError(f"no {activation} without a gate")
    return _PLAIN[activation]


def _with(names: Sequence[str], part: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names)
