"""Adapters that peft makes over the small models of tests/models/test_families.py, and their own application."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models import test_families as families
from tokenloom.adapters.adapter import Adapter
from tokenloom.kernels.program import Embed, Program, WeightSpec
from tokenloom.kernels.program_check import check_program
from tokenloom.models.checkpoint import Checkpoint

torch = pytest.importorskip("torch", reason="torch is the oracle here")
peft = pytest.importorskip("peft", reason="peft is the oracle here")

LENGTH = 60


def peft_model(family: str, **options: Any) -> Any:
    """A random adapter over the model of `family`: A and B are drawn, as peft leaves B zero."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(families.theirs(family)),
            peft.LoraConfig(task_type="CAUSAL_LM", **({"init_lora_weights": False} | options)),
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def reloaded(family: str, directory: Path) -> Any:
    """What peft makes of the files (which sort the patterns by name, so that others may come first)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(families.theirs(family))
        return peft.PeftModel.from_pretrained(base, str(directory)).eval()


def save(model: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


def their_logits(model: Any, family: str) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([families.tokens(family)[:LENGTH]])).logits[0].numpy()
    return found


@functools.cache
def base_directory(family: str) -> Path:
    """The checkpoint of the base model, which goes with the process."""
    folder = tempfile.TemporaryDirectory()
    families.theirs(family).save_pretrained(folder.name)
    path = Path(folder.name)
    _kept.append(folder)
    return path


_kept: list[Any] = []


def base_checkpoint(family: str) -> Checkpoint:
    return Checkpoint.open(base_directory(family))


def merged(
    program: Program, weights: Mapping[str, Any], adapter: Adapter
) -> tuple[Program, dict[str, NDArray[np.float32]]]:
    """A program with a head of its own, and weights that contain the adapter."""
    changed = {name: np.array(weight, np.float32) for name, weight in weights.items()}
    head = program.head.weight
    embed = next(op for op in program.ops if isinstance(op, Embed))
    shapes = {spec.name: spec.shape for spec in program.weights}
    if head == embed.weight:
        head = "own head"
        changed[head] = changed[embed.weight].copy()
        program = replace(
            program,
            head=replace(program.head, weight=head),
            weights=(*program.weights, WeightSpec(head, shapes[embed.weight], (head,))),
        )
        check_program(program)
    for block in adapter.blocks:
        name = head if block.weight == embed.weight else block.weight
        a, b = block.a.astype(np.float64), block.b.astype(np.float64)
        changed[name][block.begin : block.end] += (block.scale * (b @ a)).astype(np.float32)
    if adapter.embedding is not None:
        a, b = adapter.embedding.a.astype(np.float64), adapter.embedding.b.astype(np.float64)
        delta = adapter.embedding.scale / embed.scale * (b @ a).T
        changed[embed.weight] += delta.astype(np.float32)
    return program, changed


def our_logits(family: str, adapter: Adapter) -> NDArray[np.float32]:
    config, program, weights = families.loaded(family)
    program, weights = merged(program, weights, adapter)
    numerics = families.Numerics()
    executor = families.LocalExecutor(
        program,
        weights,
        families.rope_tables(config),
        num_frames=20,
        frame_bytes=families.page_bytes_of(program, numerics),
        pages_per_frame=1,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        num_threads=1,
        kernels=numerics.kernels,
        isa=numerics.isa,
    )
    return families.logits_of(executor, families.tokens(family)[:LENGTH], [40, *[1] * 20])
