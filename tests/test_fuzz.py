"""Files of strangers, bent at random: a clear error or a model, never anything else.

TOKENLOOM_FUZZ_CASES says how many of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.format_fixtures import BASE, EXPERTS, STORED
from tests.models.hf_fixtures import llama_tensors, safetensors_bytes
from tests.models.quantized_fixtures import METHODS
from tests.text.conftest import tiny_backend
from tokenloom.errors import TokenloomError
from tokenloom.models.checkpoint import SafetensorsFile
from tokenloom.models.hf_config import parse_config
from tokenloom.models.registry import FAMILIES, build_program
from tokenloom.text.tokenizer import Tokenizer

CASES = int(os.environ.get("TOKENLOOM_FUZZ_CASES", "1000"))
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 1 << 31, 1 << 63, 10**30, -(10**30), 0.5, -0.5, 1e300, 1e-300]
STRANGE = [*NUMBERS, float("inf"), float("nan"), None, True, False, "", "x", " ", "\ud800", [], [1], [[]], {}]
TELLING = [
    "yarn",
    "llama3",
    "longrope",
    "dynamic",
    {"rope_type": "yarn", "factor": 4.0},
    ["sliding_attention"],
]
FOREIGN = ["re:(", ["re:.*"], {"type": "Lowercase"}, {"type": "Fuse"}, {"Regex": "("}, {"a": 1}]


def places(value: Any, shown: int = 8) -> Iterator[tuple[Any, Any]]:
    """(Container, key) of everything in `value`; of a long container the first."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value) if len(value) < 80 else list(value)[:shown]
    elif isinstance(value, list):
        keys = list(range(min(len(value), shown)))
    for key in keys:
        yield value, key
        yield from places(value[key], shown)


def bent(rng: random.Random, seed: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to six values lost, replaced, or taken from elsewhere in it."""
    result = copy.deepcopy(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        found = list(places(result))
        if not found:
            break
        container, key = rng.choice(found)
        other, at = rng.choice(found)
        kind = rng.random()
        if kind < 0.15:
            del container[key]
        elif kind < 0.3:
            container[key] = copy.deepcopy(other[at])
        else:
            container[key] = copy.deepcopy(rng.choice([*STRANGE, *TELLING, *FOREIGN]))
    return result


def survive(cases: Iterator[tuple[Any, Callable[[], object]]]) -> None:
    """Run all; some must work and some must be refused, else they bend nothing or too much."""
    good = bad = 0
    for case, work in cases:
        try:
            work()
            good += 1
        except TokenloomError:
            bad += 1
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {error} at {str(case)[:4000]}")
    assert good and bad


def test_config_json() -> None:
    rng = random.Random(0)
    written = [stored.written for stored in STORED.values()] + list(METHODS.values())
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 9}

    def cases() -> Iterator[tuple[Any, Callable[[], object]]]:
        for _ in range(CASES):
            family = rng.choice(list(FAMILIES.values()))
            seed = EXPERTS | moe | {"model_type": family.model_type, "architectures": [family.architecture]}
            if family.activation != "silu":
                seed |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
            if rng.random() < 0.4:
                seed |= {"quantization_config": rng.choice(written)}
            config = bent(rng, seed)

            def work(config: dict[str, Any] = config) -> None:
                found = parse_config(config)
                if found.num_layers * (found.experts.count if found.experts else 1) < 300:
                    build_program(found)

            yield config, work

    survive(cases())


def test_safetensors_headers(tmp_path: Path) -> None:
    rng = random.Random(0)
    data = safetensors_bytes(dict(list(llama_tensors(BASE).items())[:4]))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def cases() -> Iterator[tuple[Any, Callable[[], object]]]:
        for number in range(CASES):
            if number % 2:
                text = json.dumps(bent(rng, header)).encode()
                whole = bytearray(len(text).to_bytes(8, "little") + text + data[8 + size :])
            else:
                whole = bytearray(data)
                for _ in range(rng.choice((1, 2, 5))):
                    whole[rng.randrange(8 + size)] = rng.randrange(256)
                whole = whole[: rng.choice((len(whole), rng.randrange(len(whole))))]
            path = tmp_path / "model.safetensors"
            path.write_bytes(whole)

            def work(path: Path = path) -> None:
                file = SafetensorsFile(path)
                for name in file.entries:
                    np.array(file.read(name))
                file.close()

            yield bytes(whole[: 8 + size]), work

    survive(cases())


def test_tokenizer_json(tmp_path: Path) -> None:
    rng = random.Random(0)
    seed = json.loads(tiny_backend().to_str())

    def cases() -> Iterator[tuple[Any, Callable[[], object]]]:
        for _ in range(CASES):
            file = bent(rng, seed)
            (tmp_path / "tokenizer.json").write_text(json.dumps(file))

            def work() -> None:
                tokenizer = Tokenizer.from_dir(tmp_path)
                tokenizer.decode(tokenizer.encode("hello the é \U0001f600 <s>"))

            yield file, work

    survive(cases())
