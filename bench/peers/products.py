"""Matrix products of the native kernels and of torch (oneDNN), on the shapes of a model, in turns.

    .venv/bin/python bench/peers/products.py MODEL [--threads 2] [--json]     (MODEL: S, M, L or a directory)

Needs torch in the environment of tokenloom (the `test` extra). Each product walks through copies of its weight
that together exceed every cache. The rate is that of the best walk; ours includes rounding the rows to 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads must not spin while ours work

import numpy as np
import ruler
import torch
import variants

from tokenloom.kernels.backend import kv_page_bytes
from tokenloom.kernels.builder import ProgramBuilder
from tokenloom.kernels.native import extension
from tokenloom.kernels.native.backend import NativeBackend
from tokenloom.kernels.native.weights import WeightPacker
from tokenloom.kernels.program import KVGeometry, Linear, Program
from tokenloom.runtime.synthetic_batches import uniform_batch

TURNS = 4
VOCAB = 64
HEAD_DIM = 16


def program_of(inputs: int, outputs: int, copies: int) -> Program:
    """`copies` products, and the little that a program must have besides."""
    kv = KVGeometry(1, 1, HEAD_DIM)
    b = ProgramBuilder(kv, VOCAB)
    x, normed = b.buffer("x", inputs), b.buffer("normed", inputs, "activation")
    out, qkv, q = b.buffer("out", outputs), b.buffer("qkv", 3 * HEAD_DIM), b.buffer("q", HEAD_DIM)
    attended = b.buffer("attended", HEAD_DIM, "activation")
    b.embed(b.weight("embedding", VOCAB, inputs), x)
    b.rms_norm(x, b.weight("norm", inputs), normed, 1e-6)
    for i in range(copies):
        b.linear(normed, b.weight(f"product.{i}", outputs, inputs), out)
    b.linear(normed, b.weight("qkv", 3 * HEAD_DIM, inputs), qkv)
    b.rope_store(qkv, q, layer=0, num_heads=1, rotary_dim=HEAD_DIM)
    b.attention(q, attended, layer=0, num_heads=1, scale=0.25)
    return b.finish(normed, "embedding")


class Ours:
    """The native kernels with weights in one format."""

    def __init__(self, inputs: int, outputs: int, copies: int, precision: str, pool: Any) -> None:
        program = program_of(inputs, outputs, copies)
        packer = WeightPacker(
            program,
            "bfloat16",
            pool,
            {f"product.{i}": "int8" for i in range(copies)} if precision == "int8" else {},
        )
        rng = np.random.default_rng(0)
        weights = {
            spec.name: packer.pack(spec, [rng.standard_normal(spec.shape, np.float32) * np.float32(0.05)])
            for spec in program.weights
        }
        table = np.ones((1024, HEAD_DIM // 2), np.float32)
        self._backend = NativeBackend(
            program,
            weights,
            (table, table),
            num_frames=64,
            frame_bytes=kv_page_bytes(program.kv, "bfloat16", "native"),
            pages_per_frame=1,
            dtype="bfloat16",
            kv_dtype="bfloat16",
            num_threads=pool.size,
            pool=pool,
        )
        self._products = [i for i, op in enumerate(program.ops) if isinstance(op, Linear)][:copies]

    def seconds(self, rows: int) -> float:
        """Best time of one product over whole walks through the copies."""
        batch = uniform_batch(1, rows, 0, VOCAB)
        best, walks, deadline = float("inf"), 0, time.perf_counter() + ruler.SECONDS
        while walks < 2 or time.perf_counter() < deadline:
            self._backend.profile_ops(True)
            before = self._backend.op_seconds()
            self._backend.run(batch)
            after = self._backend.op_seconds()
            spent = [after[i][1] - before[i][1] for i in self._products]
            best = min(best, sum(spent) / len(spent))
            walks += 1
        return best


def measure(config: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """One entry for each shape, number of rows and precision."""
    found = []
    pool = extension.thread_pool(threads)
    for layer, inputs, outputs in ruler.shapes_of(config):
        copies = max(2, ruler.COLD_BYTES // (2 * inputs * outputs))
        torch_weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
        for precision in ("bf16", "int8"):
            ours = Ours(inputs, outputs, copies, precision, pool)
            for rows in ruler.ROWS:
                theirs: dict[str, list[Callable[[], object]]] = (
                    ruler.bf16_products(torch_weights, rows)
                    if precision == "bf16"
                    else ruler.int8_products(outputs, inputs, copies, rows)
                )
                best_ours = best_torch = float("inf")
                for _ in range(TURNS):
                    best_ours = min(best_ours, ours.seconds(rows))
                    best_torch = min(best_torch, *(ruler.seconds_of(p) for p in theirs.values()))
                operations = 2 * rows * inputs * outputs / 1e9
                found.append(
                    {
                        "layer": layer,
                        "shape": f"{inputs}->{outputs}",
                        "rows": rows,
                        "precision": precision,
                        "ours_gop_s": round(operations / best_ours, 1),
                        "torch_gop_s": round(operations / best_torch, 1),
                        "ratio": round(best_torch / best_ours, 3),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = json.loads((variants.find_model(args.model) / "config.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        found = measure(config, args.threads)
    for entry in found:
        print(
            f"{entry['precision']} {entry['layer']:8} {entry['shape']:>12} rows {entry['rows']:4}: "
            f"{entry['ours_gop_s']:8.1f} against {entry['torch_gop_s']:8.1f} Gop/s, {entry['ratio']:.2f}x"
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
