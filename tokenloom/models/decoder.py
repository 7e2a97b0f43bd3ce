"""The decoder layer that most families share: a norm before attention and one before a gated MLP.

Families differ in biases, norms of q and k, windows, factors and caps, and in how their tensors are called and
fused. `Blocks` emits the two halves of a layer; `build` puts them together as Llama does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.program import KVGeometry, Program
from tokenloom.models.config import ModelConfig


class Blocks:
    """Emits the ops of one model. `qkv` and `gate_up` are the tensors that are stacked, or the one that holds
    them all."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        gate_up: Sequence[str] = ("gate_proj", "up_proj"),
    ) -> None:
        self.config = config
        self.b = ProgramBuilder(
            KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim), config.vocab_size
        )
        self._qkv, self._gate_up = qkv, gate_up
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
        c, b, p = self.config, self.b, f"model.layers.{layer}.self_attn."
        qkv = b.buffer("qkv", c.q_size + 2 * c.kv_size)
        q = b.buffer("q", c.q_size)
        attended = b.buffer("attended", c.q_size, "activation")
        widths = (c.q_size, c.kv_size) if c.qk_norm == "all" else (c.head_dim, c.head_dim)
        norms = [
            self._norm_weight(f"{p}{name}_norm", width)
            for name, width in zip("qk", widths, strict=True)
            if c.qk_norm != "none"
        ]
        window = c.window(layer)
        self._linear(
            self.normed, [p + name for name in self._qkv], c.q_size + 2 * c.kv_size, qkv, c.attention_bias
        )
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
        self._project(attended, p + "o_proj", out, c.output_bias, residual)

    def mlp(self, layer: int, out: str, *, residual: bool = True) -> None:
        """The gated MLP over `normed`, likewise."""
        c, p = self.config, f"model.layers.{layer}.mlp."
        gated = self.b.buffer("gated", c.intermediate_size, "activation")
        names = [p + name for name in self._gate_up]
        weight = self.b.weight(_with(names, "weight"), 2 * c.intermediate_size, self._width())
        bias = self.b.weight(_with(names, "bias"), 2 * c.intermediate_size) if c.mlp_bias else None
        self.b.linear(
            self.normed,
            weight,
            gated,
            bias=bias,
            epilogue="silu_mul" if c.activation == "silu" else "gelu_mul",
        )
        self._project(gated, p + "down_proj", out, c.mlp_bias, residual)

    def experts(self, layer: int, out: str, prefix: str, names: Sequence[str]) -> None:
        """A mixture of experts over `normed`, added to `out`. `names` are those of gate, up and down."""
        c, b, p = self.config, self.b, f"model.layers.{layer}.{prefix}."
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
            epilogue="silu_mul" if c.activation == "silu" else "gelu_mul",
        )

    def finish(self) -> Program:
        """The last norm and the head."""
        self.norm("model.norm", self.x, self.normed)
        return self.head()

    def head(self) -> Program:
        """The program, whose logits are those of `normed`."""
        c = self.config
        head = (
            self._embedding()
            if c.tie_word_embeddings
            else self.b.weight("lm_head.weight", c.vocab_size, self._width())
        )
        return self.b.finish(self.normed, head, softcap=c.logits_softcap, divisor=c.logits_divisor)

    def _width(self) -> int:
        return self.config.hidden_size

    def _embedding(self) -> str:
        return self.b.weight("model.embed_tokens.weight", self.config.vocab_size, self._width())

    def _norm_weight(self, name: str, width: int) -> str:
        return self.b.weight(f"{name}.weight", width, offset=self.config.norm_offset)

    def _linear(self, source: str, names: Sequence[str], rows: int, out: str, has_bias: bool) -> None:
        weight = self.b.weight(_with(names, "weight"), rows, self._width())
        bias = self.b.weight(_with(names, "bias"), rows) if has_bias else None
        self.b.linear(source, weight, out, bias=bias)

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
    *,
    qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    gate_up: Sequence[str] = ("gate_proj", "up_proj"),
    experts: tuple[str, Sequence[str]] = ("mlp", ("gate_proj", "up_proj", "down_proj")),
) -> Program:
    """The forward pass of a model of such layers. `experts`: where a layer has them, and how the parts of one are
    called."""
    blocks = Blocks(config, qkv=qkv, gate_up=gate_up)
    blocks.embed()
    for layer in range(config.num_layers):
        p = f"model.layers.{layer}."
        blocks.norm(p + "input_layernorm", blocks.x, blocks.normed)
        blocks.attention(layer, blocks.x)
        blocks.norm(p + "post_attention_layernorm", blocks.x, blocks.normed)
        if config.experts is not None and layer not in config.experts.dense_layers:
            blocks.experts(layer, blocks.x, *experts)
        else:
            blocks.mlp(layer, blocks.x)
    return blocks.finish()


def _with(names: Sequence[str], part: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names)
