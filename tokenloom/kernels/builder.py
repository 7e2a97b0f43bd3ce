"""How a family writes its forward pass down: each method appends one record (kernels/program.py)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenloom.kernels.program import (
    Attention,
    BufferDtype,
    BufferSpec,
    Cast,
    Embed,
    EmbedPositions,
    Epilogue,
    Experts,
    Head,
    KVGeometry,
    LayerNorm,
    Linear,
    Op,
    Program,
    RMSNorm,
    RopeStore,
    Route,
    WeightSpec,
)
from tokenloom.kernels.program_check import check_program


class ProgramBuilder:
    """Collects records; each method appends one op and returns the name of the buffer that it writes.

    Weights are declared where they are used: `weight(sources, shape)` returns the name, and asking twice for
    the same sources (tied embeddings) gives the same weight.
    """

    def __init__(self, kv: KVGeometry, vocab_size: int) -> None:
        self._kv = kv
        self._vocab_size = vocab_size
        self._ops: list[Op] = []
        self._buffers: dict[str, BufferSpec] = {}
        self._weights: dict[str, WeightSpec] = {}

    def buffer(self, name: str, width: int, dtype: BufferDtype = "float32", *, kept: bool = False) -> str:
        """Declare a buffer (again is fine when nothing differs)."""
        spec = BufferSpec(name, width, dtype, kept)
        if self._buffers.setdefault(name, spec) != spec:
            raise ValueError(f"buffer {name} is declared as {self._buffers[name]} and as {spec}")
        return name

    def width(self, name: str) -> int:
        """Elements per row of a declared buffer."""
        return self._buffers[name].width

    def weight(
        self,
        sources: str | tuple[str, ...],
        *shape: int,
        optional: bool = False,
        offset: float = 0.0,
        transposed: bool = False,
        interleaved: tuple[int, ...] = (),
    ) -> str:
        """Declare a weight made of the Hugging Face tensors `sources`."""
        names = (sources,) if isinstance(sources, str) else sources
        name = "+".join(names)
        spec = WeightSpec(name, shape, names, optional, transposed, offset, interleaved=interleaved)
        if self._weights.setdefault(name, spec) != spec:
            raise ValueError(f"weight {name} is declared as {self._weights[name]} and as {spec}")
        return name

    def embed(self, weight: str, out: str, *, scale: float = 1.0) -> str:
        self._ops.append(Embed(weight, out, scale))
        return out

    def embed_positions(self, weight: str, out: str, *, offset: int = 0) -> str:
        self._ops.append(EmbedPositions(weight, out, offset))
        return out

    def cast(self, source: str, out: str, *, add: str | None = None) -> str:
        self._ops.append(Cast(source, out, add))
        return out

    def layer_norm(
        self, source: str, weight: str, out: str, epsilon: float, *, bias: str | None = None
    ) -> str:
        self._ops.append(LayerNorm(source, weight, out, epsilon, bias))
        return out

    def rms_norm(self, source: str, weight: str, out: str, epsilon: float, *, add: str | None = None) -> str:
        self._ops.append(RMSNorm(source, weight, out, epsilon, add))
        return out

    def linear(
        self,
        source: str,
        weight: str,
        out: str,
        *,
        bias: str | None = None,
        epilogue: Epilogue = "none",
        scale: float = 1.0,
    ) -> str:
        self._ops.append(Linear(source, weight, out, bias, epilogue, scale=scale))
        return out

    def route(self, source: str, out: str, *, top_k: int, normalized: bool) -> str:
        self._ops.append(Route(source, out, top_k, normalized))
        return out

    def experts(
        self,
        source: str,
        routes: str,
        gate_up: Sequence[str],
        down: Sequence[str],
        out: str,
        *,
        epilogue: Epilogue = "silu_mul",
    ) -> str:
        self._ops.append(Experts(source, routes, out, tuple(gate_up), tuple(down), epilogue))
        return out

    def rope_store(
        self,
        source: str,
        out: str,
        *,
        layer: int,
        num_heads: int,
        rotary_dim: int,
        norms: tuple[str, str] | None = None,
        epsilon: float = 0.0,
        table: int = 0,
    ) -> str:
        """`norms` are the weights of the norms of q and k, of this `epsilon`."""
        q_norm, k_norm = norms or (None, None)
        kv = self._kv
        self._ops.append(
            RopeStore(
                source,
                out,
                layer,
                num_heads,
                kv.num_kv_heads,
                kv.head_dim,
                rotary_dim,
                q_norm,
                k_norm,
                epsilon,
                table,
            )
        )
        return out

    def attention(
        self,
        source: str,
        out: str,
        *,
        layer: int,
        num_heads: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> str:
        kv = self._kv
        self._ops.append(
            Attention(source, out, layer, num_heads, kv.num_kv_heads, kv.head_dim, scale, window, softcap)
        )
        return out

    def finish(
        self, source: str, weight: str, *, softcap: float | None = None, divisor: float = 1.0
    ) -> Program:
        """The checked program whose logits are source @ weight.T."""
        program = Program(
            ops=tuple(self._ops),
            head=Head(source, weight, softcap, divisor),
            buffers=tuple(self._buffers.values()),
            weights=tuple(self._weights.values()),
            kv=self._kv,
            vocab_size=self._vocab_size,
        )
        check_program(program)
        return program
