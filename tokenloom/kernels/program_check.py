"""Which programs are legal."""

from __future__ import annotations

from tokenloom.kernels.program import (
    MAX_CHOSEN,
    MAX_EXPERTS,
    PAIRED,
    Attention,
    Cast,
    Embed,
    EmbedPositions,
    Experts,
    Gather,
    LayerNorm,
    Linear,
    Program,
    RMSNorm,
    RopeStore,
    Route,
)


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
        self.routed: dict[str, int] = {}
        _distinct("buffer", [spec.name for spec in program.buffers])
        _distinct("weight", [spec.name for spec in program.weights])
        for spec in program.weights:
            if spec.offset and len(spec.shape) != 1:
                raise ValueError(f"weight {spec.name} of shape {spec.shape} has an offset")
            if not spec.sources or not spec.shape or min(spec.shape) < 1:
                raise ValueError(f"weight {spec.name} has shape {spec.shape} and sources {spec.sources}")
            parts = spec.interleaved
            if parts and (len(spec.sources) > 1 or min(parts) < 1 or spec.shape[0] % sum(parts)):
                raise ValueError(
                    f"weight {spec.name} of {spec.shape[0]} rows from {len(spec.sources)} sources is not "
                    f"interleaved of {parts}"
                )

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
        self.routed.pop(name, None)

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
        self.read(op.routes)
        if self.routed.get(op.routes) != len(op.gate_up):
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
        for name in (*op.gate_up, *op.down):
            if self.input_orders[name] is not None:
                raise ValueError(f"weight {name} of an expert has its columns in another order")

    def heads(self, op: RopeStore | Attention) -> None:
        if (op.num_kv_heads, op.head_dim) != (self.kv.num_kv_heads, self.kv.head_dim):
            raise ValueError(f"layer {op.layer} has other heads than the KV pool {self.kv}")
        if not 0 <= op.layer < self.kv.num_layers:
            raise ValueError(f"layer {op.layer} lies outside the KV pool of {self.kv.num_layers} layers")
        if op.num_heads % op.num_kv_heads:
            raise ValueError(f"{op.num_heads} heads cannot share {op.num_kv_heads} KV heads")


def check_program(program: Program) -> None:
    """Raise ValueError unless every name is known, every buffer is written before it is read, and all shapes
    agree."""
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
    checker.ordered(program.head.weight, program.head.source)
    if not checker.optional <= checker.biases:
        raise ValueError(f"only biases may be optional: {sorted(checker.optional - checker.biases)}")


def _distinct(kind: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a {kind} name stands twice in {names}")
