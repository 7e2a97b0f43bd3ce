"""Modules, ranks and scales against the functions of peft, over random configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.adapters.peft_config import CONFIG_FILE, LoraConfig, read_lora_config

peft = pytest.importorskip("peft", reason="peft is the oracle here")
tuners = pytest.importorskip("peft.tuners.tuners_utils")
others = pytest.importorskip("peft.utils.other")

MODULES = [
    *(
        f"model.layers.{i}.{part}"
        for i in (0, 1, 2, 10, 11)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
    ),
    *(f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")),
    *(f"model.decoder.layers.{i}.fc{n}" for i in (0, 3) for n in (1, 2)),
    "model.embed_tokens",
    "lm_head",
    "0.mlp",
    "h.1.q_proj",
]
NAMES = st.sampled_from(
    [
        "q_proj",
        "up_proj",
        "c_proj",
        "attn.c_proj",
        "fc1",
        "lm_head",
        "proj",
        "model.layers.1.mlp.up_proj",
        "1.up_proj",
        "mlp",
    ]
)
PATTERNS = st.sampled_from(
    [
        "q_proj", r".*_proj", r"model\.layers\.(0|1)\..*", r".*\.layers\.\d+\.(mlp|self_attn)\..*_proj",
        "layers.1.mlp.up_proj", r"^model\.layers\.1.*", r"[^.]*head", r".*\.1.?\..*", "(q|o)_proj", "c_.*",
        r"experts\.\d\.up_proj", "fc[12]$", "lm.head",
    ]
)  # fmt: skip
SELECTIONS = st.one_of(st.lists(NAMES, min_size=1, max_size=4), PATTERNS)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.one_of(st.integers(1, 64), st.floats(0.25, 64))),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(SELECTIONS),
        "exclude_modules": draw(st.one_of(st.none(), SELECTIONS)),
        "rank_pattern": draw(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(PATTERNS, st.floats(0.25, 64), max_size=3)),
    }
    if isinstance(fields["target_modules"], list) and draw(st.booleans()):
        fields["layers_to_transform"] = draw(
            st.one_of(st.integers(0, 3), st.lists(st.integers(0, 11), max_size=3))
        )
        lists = st.sampled_from(["layers", "h", "model.layers", "experts"])
        fields["layers_pattern"] = draw(st.one_of(st.none(), lists, st.lists(lists, max_size=2)))
    return fields


def ours(fields: dict[str, Any]) -> LoraConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CONFIG_FILE)
        path.write_text(json.dumps({"peft_type": "LORA"} | fields))
        return read_lora_config(path)


@settings(max_examples=400)
@given(configurations())
def test_as_peft(fields: dict[str, Any]) -> None:
    if not fields.get("layers_to_transform", True) and fields["layers_to_transform"] != 0:
        fields["layers_pattern"] = None
    found, theirs = ours(fields), peft.LoraConfig(**fields)
    for module in MODULES:
        wanted = tuners.check_target_module_exists(theirs, module)
        assert found.is_target(module, is_inner_linear=True) == bool(wanted), module
        rank = theirs.rank_pattern.get(others.get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(
            others.get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha
        )
        assert found.rank_of(module) == rank
        assert found.scale_of(module) == alpha / (rank**0.5 if fields["use_rslora"] else rank)


def test_defaults_are_those_of_peft() -> None:
    found, theirs = ours({"target_modules": ["q_proj"]}), peft.LoraConfig()
    assert (found.rank, found.alpha, found.is_rank_stabilised) == (
        theirs.r,
        theirs.lora_alpha,
        theirs.use_rslora,
    )


def test_every_field_of_peft_is_decided_on() -> None:
    """What peft writes by default is accepted; a field that a new version adds shows up here once it is not off."""
    ours(
        {name: _plain(value) for name, value in peft.LoraConfig(target_modules=["q_proj"]).to_dict().items()}
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
