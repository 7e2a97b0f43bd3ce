"""One process that measures one part of bench/adapters.py; the last line it prints is the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import loading
import peer_engines
import throughput
from files import AdapterFiles
from serving import model_directory

PARTS: dict[str, Callable[[dict[str, Any], AdapterFiles], dict[str, Any]]] = {
    "equal": checks.measure_equal,
    "mixes": throughput.measure_mixes,
    "all7": throughput.measure_all7,
    "prefill": throughput.measure_prefill,
    "loading": loading.measure_loading,
    "register": throughput.measure_register,
    "zipf": throughput.measure_zipf,
    "many": checks.measure_many,
    "vllm": peer_engines.measure_vllm,
    "vllm_base": peer_engines.measure_vllm_base,
    "peft": peer_engines.measure_peft,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    model = model_directory(spec)
    adapters = AdapterFiles(model, Path(spec["work"]) / f"files-{model.name}")
    result = PARTS[spec["part"]](spec, adapters)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
