"""The ruler: what this machine can do at best, measured in the same run as the engines.

    python ruler.py MODEL_DIRECTORY THREADS        (prints one JSON object; needs torch and a C compiler)

Memory read bandwidth bounds decoding; the rates of torch's matrix products (oneDNN) on the model's own shapes
show what a good library makes of it. The weights of a shape are walked through in copies that together exceed
every cache, as the layers of a model do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import machine
import torch

ROWS: Final = (1, 4, 8, 16, 32, 64, 128, 512)
COLD_BYTES: Final = 192 * 2**20
"""Weights walked through at least, so that they come from memory."""
SECONDS: Final = 0.15
"""Spent on each shape, number of rows and product."""


def read_bandwidth(threads: int) -> dict[str, float]:
    """GB/s of plain reading, for several numbers of streams, with and without huge pages."""
    source = Path(__file__).with_name("memory_bandwidth.c")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bandwidth"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True
        )
        rates = {}
        for streams in (1, 4):
            for huge in (0, 1):
                command = [str(program), str(threads), str(streams), str(huge)]
                shown = subprocess.run(command, check=True, capture_output=True, text=True)
                rates[f"streams={streams} huge_pages={huge}"] = float(shown.stdout)
    return rates


def shapes_of(config: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, inputs, outputs) of the linear layers of a Llama model; what engines fuse is fused."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    return [
        ("qkv", hidden, (heads + 2 * kv_heads) * head_dim),
        ("out", heads * head_dim, hidden),
        ("gate_up", hidden, 2 * inner),
        ("down", inner, hidden),
        ("lm_head", hidden, config["vocab_size"]),
    ]


def seconds_of(products: list[Callable[[], object]]) -> float:
    """Best time of one product, over whole walks through the copies."""
    best = float("inf")
    deadline = time.perf_counter() + SECONDS
    walks = 0
    while walks < 2 or time.perf_counter() < deadline:
        started = time.perf_counter()
        for product in products:
            product()
        best = min(best, (time.perf_counter() - started) / len(products))
        walks += 1
    return best


def bf16_products(weights: list[torch.Tensor], rows: int) -> dict[str, list[Callable[[], object]]]:
    """torch's linear as users write it, and with the weights packed once, as compiled models use it."""
    x = torch.randn(rows, weights[0].shape[1]).bfloat16()
    products: dict[str, list[Callable[[], object]]] = {
        "bf16 linear": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    }
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
        products["bf16 packed"] = [
            lambda w=w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in packed
        ]
    return products


def int8_products(outputs: int, inputs: int, copies: int, rows: int) -> dict[str, list[Callable[[], object]]]:
    """oneDNN's int8 product with packed weights, one scale for each output channel."""
    torch.backends.quantized.engine = "onednn"
    weight = torch.quantize_per_channel(
        torch.randn(outputs, inputs),
        torch.full((outputs,), 0.02),
        torch.zeros(outputs, dtype=torch.long),
        0,
        torch.qint8,
    )
    packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(copies)]
    x = torch.quantize_per_tensor(torch.randn(rows, inputs), 0.05, 128, torch.quint8)
    return {"int8 packed": [lambda w=w: torch.ops.quantized.linear(x, w, 0.5, 128) for w in packed]}


def gemm_rates(config: dict[str, Any]) -> list[dict[str, Any]]:
    """GFLOP/s and GB/s of weights for each shape, number of rows and product."""
    rates = []
    for name, inputs, outputs in shapes_of(config):
        copies = max(2, COLD_BYTES // (2 * inputs * outputs))
        weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
        for rows in ROWS:
            found = [(label, 2, p) for label, p in bf16_products(weights, rows).items()]
            found += [(label, 1, p) for label, p in int8_products(outputs, inputs, copies, rows).items()]
            for label, bytes_each, products in found:
                seconds = seconds_of(products)
                rates.append(
                    {
                        "layer": name,
                        "shape": f"{inputs}->{outputs}",
                        "rows": rows,
                        "product": label,
                        "gflop_s": round(2 * rows * inputs * outputs / seconds / 1e9, 1),
                        "weights_gb_s": round(bytes_each * inputs * outputs / seconds / 1e9, 2),
                    }
                )
    return rates


def main() -> None:
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    config = json.loads((model / "config.json").read_text())
    torch.set_num_threads(threads)
    load = machine.OtherLoad()
    bandwidth = read_bandwidth(threads)
    with torch.inference_mode():
        gemm = gemm_rates(config)
    result = {
        "read_gb_s": max(bandwidth.values()),
        "read_gb_s_by_variant": bandwidth,
        "gemm": gemm,
        "other_cores": round(load.cores(), 3),
        "versions": {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()},
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
