"""What is read from a directory, what its identity is, and what is refused."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.adapters.directories import CONFIG, LAYER, PREFIX, RANK, UP, Q, base, read, tensors, write
from tests.models.hf_fixtures import (
    MIXTRAL,
    TINY,
    llama_tensors,
    mixtral_tensors,
    safetensors_bytes,
    write_model,
)
from tokenloom.adapters import peft_directory
from tokenloom.adapters.peft_directory import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from tokenloom.errors import ModelError
from tokenloom.models.loading import describe_model
from tokenloom.models.weight_sources import source_rows

Arrays = dict[str, np.ndarray]
EMBEDDING = f"{PREFIX}model.embed_tokens"
HEAD = f"{PREFIX}lm_head"


def embedding_tensors(rank: int = RANK) -> Arrays:
    rng = np.random.default_rng(1)
    return {
        f"{EMBEDDING}.lora_embedding_A": rng.standard_normal((rank, 64)).astype(np.float32),
        f"{EMBEDDING}.lora_embedding_B": rng.standard_normal((32, rank)).astype(np.float32),
    }


def test_blocks(tmp_path: Path) -> None:
    adapter = read(write(tmp_path))
    q, up = f"{LAYER}self_attn.", f"{LAYER}mlp."
    qkv = "+".join(f"{q}{part}_proj.weight" for part in "qkv")
    gate_up = f"{up}gate_proj.weight+{up}up_proj.weight"
    first, second = adapter.blocks[:2]
    assert (first.weight, first.begin, first.end) == (qkv, 0, 32)
    assert (second.weight, second.begin, second.end) == (gate_up, 48, 96)
    assert first.scale == second.scale == 8 / RANK
    assert (first.a == tensors()[f"{Q}.lora_A.weight"]).all()
    assert (second.b == tensors()[f"{UP}.lora_B.weight"]).all()
    assert adapter.base_model_name == "some/base" and adapter.max_rank == RANK and adapter.embedding is None
    assert adapter.num_bytes == sum(array.nbytes for array in tensors().values())
    assert len(adapter.blocks) == 4 and len(adapter.content_id) == 32
    with pytest.raises(ValueError, match="read-only"):
        first.a[0, 0] = 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_are_kept(dtype: Any, tmp_path: Path) -> None:
    adapter = read(write(tmp_path, arrays=tensors(dtype)))
    assert all(block.a.dtype == dtype and block.b.dtype == dtype for block in adapter.blocks)


def test_names_with_that_of_an_adapter(tmp_path: Path) -> None:
    renamed = {name.replace(".weight", ".default.weight"): array for name, array in tensors().items()}
    assert read(write(tmp_path / "a")).content_id == read(write(tmp_path / "b", arrays=renamed)).content_id


def test_scales(tmp_path: Path) -> None:
    stabilised = read(
        write(tmp_path / "a", {"use_rslora": True, "alpha_pattern": {"layers.1.mlp.up_proj": 3}})
    )
    assert [block.scale for block in stabilised.blocks] == [8 / 2, 8 / 2, 8 / 2, 3 / 2]


def test_the_identity_is_that_of_what_changes_outputs(tmp_path: Path) -> None:
    first = read(write(tmp_path / "0")).content_id
    same = {
        "other fields": ({"lora_dropout": 0.5, "base_model_name_or_path": "other", "task_type": None}, None),
        "other spelling": ({"target_modules": ".*(q|up)_proj", "exclude_modules": ["k_proj"]}, None),
        "other split of the scale": ({"lora_alpha": 4, "alpha_pattern": {"q_proj": 8, "up_proj": 8.0}}, None),
        "other order": ({}, dict(reversed(tensors().items()))),
    }
    for name, (config, arrays) in same.items():
        assert read(write(tmp_path / name, config, arrays)).content_id == first, name
    bent = tensors()
    bent[f"{Q}.lora_A.weight"] = bent[f"{Q}.lora_A.weight"].copy()
    bent[f"{Q}.lora_A.weight"][0, 0] += 1
    swapped = tensors()
    for part in ("lora_A", "lora_B"):
        one, other = (f"{PREFIX}model.layers.{i}.mlp.up_proj.{part}.weight" for i in (0, 1))
        swapped[one], swapped[other] = swapped[other], swapped[one]
    other = {
        "scale": ({"lora_alpha": 9}, None),
        "number": ({}, bent),
        "type": ({}, tensors(np.float16)),
        "place": ({}, swapped),
        "less": (
            {"layers_to_transform": [0]},
            {name: array for name, array in tensors().items() if ".layers.0." in name},
        ),
    }
    found = {read(write(tmp_path / name, *case)).content_id for name, case in other.items()}
    assert len(found | {first}) == len(other) + 1


def test_an_embedding_with_a_copy_of_the_base_weight(tmp_path: Path) -> None:
    weight = llama_tensors(TINY)["model.embed_tokens.weight"]
    arrays = embedding_tensors() | {f"{EMBEDDING}.base_layer.weight": weight}
    config = {"target_modules": ["embed_tokens"]}
    adapter = read(write(tmp_path, config, arrays))
    assert adapter.blocks == () and adapter.embedding is not None
    assert (adapter.embedding.a.shape, adapter.embedding.b.shape) == ((RANK, 64), (32, RANK))
    rounded = arrays | {f"{EMBEDDING}.base_layer.weight": weight.astype(ml_dtypes.bfloat16)}
    assert read(write(tmp_path / "rounded", config, rounded)).content_id == adapter.content_id
    without = read(write(tmp_path / "without", config, embedding_tensors()))
    assert without.content_id == adapter.content_id
    changed = weight.copy()
    changed[63, 31] += 1e-3
    with pytest.raises(ModelError, match="differs from model.embed_tokens.weight"):
        read(write(tmp_path / "changed", config, arrays | {f"{EMBEDDING}.base_layer.weight": changed}))
    _, program = base()
    with pytest.raises(ModelError, match="cannot be compared"):
        read_adapter(tmp_path, program, source_rows=source_rows(program))


def test_links_inside_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    write(blobs)
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    assert read(snapshot).content_id == read(blobs).content_id
    inner = snapshot / "draft"
    inner.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (inner / name).symlink_to(Path("..", "..", "..", "blobs", name))
    assert read(inner).content_id == read(blobs).content_id
    (inner / CONFIG_FILE).unlink()
    (inner / CONFIG_FILE).symlink_to(write(tmp_path / "elsewhere") / CONFIG_FILE)
    with pytest.raises(ModelError, match="links out of"):
        read(inner)


def test_experts_are_refused_and_routers_are_not(tmp_path: Path) -> None:
    config = TINY | MIXTRAL
    program = describe_model(write_model(tmp_path / "model", config, mixtral_tensors(config))).program
    router = f"{PREFIX}{LAYER}block_sparse_moe.gate"
    expert = f"{PREFIX}{LAYER}block_sparse_moe.experts.0.w1"
    arrays = {
        f"{router}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{router}.lora_B.weight": np.ones((8, 4), np.float32),
    }
    # Layer 1 has none: newer versions of transformers have no linear there.
    adapter = read_adapter(
        write(tmp_path / "a", {"target_modules": ["gate"]}, arrays), program, source_rows=source_rows(program)
    )
    assert [block.weight for block in adapter.blocks] == [f"{LAYER}block_sparse_moe.gate.weight"]
    arrays = {
        f"{expert}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{expert}.lora_B.weight": np.ones((48, 4), np.float32),
    }
    with pytest.raises(ModelError, match=r"experts\.0\.w1': a module of experts"):
        read_adapter(
            write(tmp_path / "b", {"target_modules": ["w1"]}, arrays),
            program,
            source_rows=source_rows(program),
        )


# --- hostile directories ---------------------------------------------------------------------------------

Bend = Callable[[dict[str, Any], Arrays], None]


def fields(**changes: Any) -> Bend:
    return lambda config, arrays: config.update(changes)


def put(name: str, array: Any) -> Bend:
    return lambda config, arrays: arrays.update({name: np.asarray(array)})


def drop(*names: str) -> Bend:
    def bend(config: dict[str, Any], arrays: Arrays) -> None:
        for name in names:
            del (arrays if name in arrays else config)[name]

    return bend


def fill(value: float) -> Bend:
    def bend(config: dict[str, Any], arrays: Arrays) -> None:
        array = arrays[f"{UP}.lora_B.weight"] = arrays[f"{UP}.lora_B.weight"].copy()
        array[-1, -1] = value

    return bend


ONES = np.ones((4, 32), np.float32)
REFUSED: dict[str, tuple[Bend, str]] = {
    "no kind": (drop("peft_type"), "without peft_type"),
    "other kind": (fields(peft_type="IA3"), "peft_type = 'IA3'"),
    "kind of a list": (fields(peft_type=["LORA"]), "peft_type"),
    "dora": (fields(use_dora=True), "use_dora = True"),
    "trained biases": (fields(bias="lora_only"), "bias = 'lora_only'"),
    "all biases": (fields(bias="all"), "bias = 'all'"),
    "bias of b": (fields(lora_bias=True), "lora_bias"),
    "whole modules": (fields(modules_to_save=["lm_head"]), "modules_to_save"),
    "parameters": (fields(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
    "tokens": (fields(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "tokens by name": (fields(trainable_token_indices={"embed_tokens": [1]}), "trainable_token_indices"),
    "activated": (fields(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "megatron": (fields(megatron_config={"a": 1}), "megatron_config"),
    "replicated layers": (fields(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "tied": (fields(ensure_weight_tying=True), "ensure_weight_tying"),
    "qalora": (fields(use_qalora=True), "'use_qalora'"),
    "velora": (fields(velora_config={"scale": 1.0}), "'velora_config'"),
    "monteclora": (fields(monteclora_config={"num_samples": 8}), "'monteclora_config'"),
    "block diagonal": (fields(use_bdlora={"nblocks": 2}), "'use_bdlora'"),
    "arrow": (fields(arrow_config={"top_k": 3}), "'arrow_config'"),
    "kasa": (fields(kasa_config={"beta": 1e-4}), "'kasa_config'"),
    "unknown field": (fields(use_tomorrow=True), "'use_tomorrow' = True"),
    "unknown field, zero": (fields(tomorrow=0), "'tomorrow' = 0"),
    "long unknown field": (fields(**{"x" * 100_000: 1}), "'xxx"),
    "pissa": (fields(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "pissa, fast": (fields(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "olora": (fields(init_lora_weights="OLoRA"), "init_lora_weights"),
    "corda": (fields(init_lora_weights="corda"), "init_lora_weights"),
    "lora-ga": (fields(init_lora_weights="lora_ga"), "init_lora_weights"),
    "loftq": (fields(init_lora_weights="loftq"), "init_lora_weights"),
    "unknown start": (fields(init_lora_weights="tomorrow"), "init_lora_weights"),
    "start of a number": (fields(init_lora_weights=3), "init_lora_weights"),
    "rank 0": (fields(r=0), "r = 0"),
    "rank below 0": (fields(r=-4), "r = -4"),
    "rank 257": (fields(r=257), "r = 257"),
    "rank of a float": (fields(r=4.0), "r = 4.0"),
    "rank of a flag": (fields(r=True), "r = True"),
    "other rank": (fields(r=8), r"lora_A.weight of shape \[4, 32\] instead of \[8, 32\]"),
    "other rank by a pattern": (fields(rank_pattern={"q_proj": 2}), r"q_proj.lora_B.weight of shape \[32, 4\] instead"),
    "rank 0 by a pattern": (fields(rank_pattern={"q_proj": 0}), "rank_pattern: 'q_proj' = 0"),
    "no pattern": (fields(rank_pattern={"(": 4}), "rank_pattern"),
    "patterns of a list": (fields(rank_pattern=["q_proj"]), "rank_pattern"),
    "too many patterns": (fields(rank_pattern={str(i): 4 for i in range(5000)}), "at most 4096"),
    "slow pattern": (fields(alpha_pattern={".*" * 900 + f"b{i}": 4 for i in range(50)}), "takes too long"),
    "alpha of text": (fields(lora_alpha="16"), "lora_alpha = '16'"),
    "huge alpha": (fields(lora_alpha=1e300), "lora_alpha"),
    "alpha by a pattern": (fields(alpha_pattern={"q_proj": None}), "alpha_pattern: 'q_proj' = None"),
    "stabilised of text": (fields(use_rslora="yes"), "use_rslora"),
    "no targets": (fields(target_modules=None), "target_modules"),
    "empty targets": (fields(target_modules=[]), "target_modules"),
    "targets of numbers": (fields(target_modules=[1]), "target_modules"),
    "targets of an object": (fields(target_modules={"q_proj": 1}), "target_modules"),
    "bad pattern of targets": (fields(target_modules="*"), "target_modules"),
    "less than the tensors": (fields(target_modules=["q_proj"]), "mlp.up_proj, which target_modules does not select"),
    "excluded": (fields(exclude_modules=["up_proj"]), "mlp.up_proj, which target_modules does not select"),
    "other layers": (fields(layers_to_transform=[0]), "layers.1.self_attn.q_proj, which target_modules does not"),
    "layers of text": (fields(layers_to_transform=["0"]), "layers_to_transform"),
    "huge layer": (fields(layers_to_transform=1 << 70), "layers_to_transform"),
    "layers of a pattern": (fields(target_modules=".*", layers_to_transform=[0]), "layers_to_transform"),
    "list of layers alone": (fields(layers_pattern="layers"), "layers_pattern"),
    "many lists of layers": (
        fields(layers_to_transform=[0], layers_pattern=[f"a{i}" for i in range(65)]),
        "layers_pattern",
    ),
    "odd list of layers": (fields(layers_to_transform=[0], layers_pattern="(a|b"), "layers_pattern"),
    "more than the tensors": (
        fields(target_modules=["q_proj", "up_proj", "v_proj"]),
        "missing base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
    ),
    "all linears, but some": (fields(target_modules="all-linear"), "missing .*down_proj"),
    "half a name": (fields(base_model_name_or_path="\ud800"), "base_model_name_or_path"),
    "name of a number": (fields(base_model_name_or_path=7), "base_model_name_or_path"),
    "no b": (drop(f"{Q}.lora_B.weight"), "missing .*q_proj.lora_B.weight"),
    "no a": (drop(f"{Q}.lora_A.weight"), "missing .*q_proj.lora_A.weight"),
    "no module": (drop(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), "missing .*q_proj.lora_A.weight, which"),
    "no tensor": (lambda config, arrays: arrays.clear(), "missing"),
    "twice": (put(f"{Q}.lora_A.default.weight", ONES), "lora_A.default.weight.* beside|lora_A.weight.* beside"),
    "other adapter": (put(f"{Q}.lora_A.mine.weight", ONES), "lora_A.mine.weight': unexpected"),
    "no prefix": (put("model.layers.0.self_attn.q_proj.lora_A.weight", ONES), "without the prefix"),
    "unexpected": (put(f"{PREFIX}{LAYER}mlp.up_proj.weight", ONES), "up_proj.weight': unexpected"),
    "magnitude": (put(f"{Q}.lora_magnitude_vector", ONES[0]), "a DoRA magnitude"),
    "bias tensor": (put(f"{Q}.lora_B.bias", ONES[0]), "a trained bias"),
    "norm": (put(f"{PREFIX}{LAYER}input_layernorm.lora_A.weight", ONES), "input_layernorm': no linear"),
    "path": (put(f"{PREFIX}../../etc/passwd.lora_A.weight", ONES), "passwd': no linear"),
    "odd characters": (put(f"{PREFIX}\u202e\n\x00.lora_A.weight", ONES), r"\\u202e\\n\\x00.lora_A.weight': unexpected"),
    "long name": (put(f"{PREFIX}{'y' * 100_000}.lora_A.weight", ONES), "yyy"),
    "layer beyond": (
        put(f"{PREFIX}model.layers.2.mlp.up_proj.lora_A.weight", ONES),
        "layer 2, which the model does not have",
    ),
    "expert": (put(f"{PREFIX}{LAYER}mlp.experts.3.up_proj.lora_A.weight", ONES), "a module of experts"),
    "linear as an embedding": (put(f"{Q}.lora_embedding_A", ONES), "lora_embedding_A over a module of kind linear"),
    "copy of a linear": (put(f"{Q}.base_layer.weight", np.ones((32, 32), np.float32)), "only embedding and head"),
    "inputs": (put(f"{Q}.lora_A.weight", np.ones((4, 31), np.float32)), r"of shape \[4, 31\] instead of \[4, 32\]"),
    "outputs": (put(f"{UP}.lora_B.weight", np.ones((96, 4), np.float32)), r"of shape \[96, 4\] instead of \[48, 4\]"),
    "turned": (put(f"{UP}.lora_B.weight", np.ones((4, 48), np.float32)), r"of shape \[4, 48\] instead of \[48, 4\]"),
    "flat": (put(f"{Q}.lora_A.weight", np.ones(128, np.float32)), r"of shape \[128\] instead of \[4, 32\]"),
    "scalar": (put(f"{Q}.lora_A.weight", np.float32(1)), r"of shape \[\] instead"),
    "three dimensions": (put(f"{Q}.lora_A.weight", np.ones((4, 32, 1), np.float32)), r"\[4, 32, 1\] instead"),
    "nothing": (put(f"{Q}.lora_A.weight", np.ones((0, 32), np.float32)), r"\[0, 32\] instead"),
    "integers": (put(f"{Q}.lora_A.weight", np.ones((4, 32), np.int32)), "lora_A.weight' of dtype I32"),
    "nan": (fill(np.nan), "up_proj.lora_B.weight with values that are not finite"),
    "infinity": (fill(-np.inf), "up_proj.lora_B.weight with values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_contents(name: str, tmp_path: Path) -> None:
    bend, wanted = REFUSED[name]
    config, arrays = dict(CONFIG), tensors()
    bend(config, arrays)
    write(tmp_path, arrays=arrays)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=wanted) as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 20_000
    str(caught.value).encode()


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(data) and None


def relink(name: str, target: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(target)

    return change


def special(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return change


def outside(directory: Path) -> None:
    (directory / WEIGHTS_FILE).rename(directory.parent / "elsewhere.safetensors")
    (directory / WEIGHTS_FILE).symlink_to(directory.parent / "elsewhere.safetensors")


def as_folder(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / WEIGHTS_FILE).mkdir()


def pickled(directory: Path) -> None:
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")


def cut(count: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = (directory / WEIGHTS_FILE).read_bytes()
        (directory / WEIGHTS_FILE).write_bytes(data[:count])

    return change


def header(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode()


SPECIAL_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda d: (d / CONFIG_FILE).unlink(), CONFIG_FILE),
    "no weights": (lambda d: (d / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "pickle": (pickled, "pickle can run code"),
    "link out": (outside, "links out of"),
    "config links out": (relink(CONFIG_FILE, "/etc/hostname"), "links out of"),
    "link in a circle": (relink(CONFIG_FILE, CONFIG_FILE), CONFIG_FILE),
    "link to nothing": (relink(WEIGHTS_FILE, "gone"), "gone"),
    "device": (relink(WEIGHTS_FILE, "/dev/zero"), "links out of"),
    "pipe": (special(WEIGHTS_FILE), "not a regular file"),
    "config is a pipe": (special(CONFIG_FILE), "not a regular file"),
    "folder": (as_folder, "not a regular file"),
    "empty": (overwrite(WEIGHTS_FILE, b""), "0 bytes"),
    "cut in the length": (cut(5), "5 bytes"),
    "cut in the header": (cut(100), "cut short"),
    "cut in the numbers": (cut(-1), "cut short"),
    "huge header": (overwrite(WEIGHTS_FILE, (1 << 62).to_bytes(8, "little")), "header of"),
    "header of 5 MiB": (
        overwrite(WEIGHTS_FILE, header("{" + " " * (5 << 20) + "}")),
        "at most 4194304 bytes",
    ),
    "deep header": (overwrite(WEIGHTS_FILE, header("[" * 1_000_000)), "nested too deeply|JSON"),
    "twice in the header": (overwrite(WEIGHTS_FILE, header('{"a": 1, "a": 2}')), "twice"),
    "config of 2 MiB": (overwrite(CONFIG_FILE, b" " * (2 << 20) + b"{}"), "at most 1048576 bytes"),
    "deep config": (overwrite(CONFIG_FILE, b'{"a":' * 100_000), "nested too deeply|JSON"),
    "long number": (
        overwrite(CONFIG_FILE, b'{"peft_type": "LORA", "r": ' + b"9" * 500_000 + b"}"),
        CONFIG_FILE,
    ),
    "config of a list": (overwrite(CONFIG_FILE, b"[]"), "JSON of type list"),
    "no text": (overwrite(CONFIG_FILE, b"\xff\xfe{}"), "UTF-8"),
    "not a number": (overwrite(CONFIG_FILE, b'{"r": NaN}'), "NaN"),
    "field twice": (overwrite(CONFIG_FILE, b'{"r": 1, "r": 2}'), "twice"),
}


@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    change, wanted = SPECIAL_FILES[name]
    directory = write(tmp_path / "adapter")
    change(directory)
    start = time.perf_counter()
    with pytest.raises(ModelError, match=wanted) as caught:
        read(directory)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 20_000


def test_a_stack_whose_split_is_not_known(tmp_path: Path) -> None:
    _, program = base()
    with pytest.raises(ModelError, match=r"q_proj'?: a part of a stack whose parts are not known"):
        read_adapter(write(tmp_path), program, source_rows={})


def test_no_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none", write(tmp_path / "a") / CONFIG_FILE, Path("a\0b")):
        with pytest.raises(ModelError):
            read(path)


def test_the_list_of_problems_ends(tmp_path: Path) -> None:
    arrays = {f"{PREFIX}model.layers.{i}.odd.lora_A.weight": ONES for i in range(200)}
    with pytest.raises(ModelError, match="and 154 more") as caught:
        read(write(tmp_path, arrays=arrays))
    assert str(caught.value).count("odd") == 50


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    original = peft_directory.TensorFile.read
    for change, wanted in ((data + b"more", "changed while it was read"), (data[:-200], "while it was read")):

        def read_and_change(file: Any, name: str, change: bytes = change) -> Any:
            (tmp_path / WEIGHTS_FILE).write_bytes(change)
            return original(file, name)

        (tmp_path / WEIGHTS_FILE).write_bytes(data)
        monkeypatch.setattr(peft_directory.TensorFile, "read", read_and_change)
        with pytest.raises(ModelError, match=wanted):
            read(tmp_path)


def changed(data: bytes, end: int, rng: random.Random) -> bytes:
    """`data` with up to three bytes replaced, left out or repeated before `end`."""
    bent = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(min(end, len(bent)))
        kind = rng.randrange(4)
        if kind == 0:
            bent[place] = rng.randrange(256)
        elif kind == 1:
            bent[place] = rng.choice(b'0129-."{}[],:eE\\u')
        elif kind == 2:
            del bent[place]
        else:
            bent[place:place] = bent[place : place + rng.randint(1, 20)]
    return bytes(bent)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_thousands_of_changed_bytes(name: str, tmp_path: Path) -> None:
    """Any file is either refused in one line or gives an adapter of finite numbers that fits."""
    _, program = base()
    rows, rng = source_rows(program), random.Random(0)
    whole = (write(tmp_path) / name).read_bytes()
    in_header = len(whole) if name == CONFIG_FILE else 8 + int.from_bytes(whole[:8], "little")
    refused, seconds = 0, 0.0
    for i in range(1500):
        (tmp_path / name).write_bytes(changed(whole, len(whole) if i % 4 == 0 else in_header, rng))
        start = time.perf_counter()
        try:
            adapter = read_adapter(tmp_path, program, source_rows=rows)
            assert all(np.isfinite(block.b).all() and 1 <= len(block.a) <= 256 for block in adapter.blocks)
        except ModelError as error:
            refused += 1
            str(error).encode()
        seconds += time.perf_counter() - start
    assert 750 < refused < 1500
    assert seconds < 10


def test_a_large_file_is_refused_by_its_size(tmp_path: Path) -> None:
    write(tmp_path)
    os.truncate(tmp_path / WEIGHTS_FILE, 5 << 30)
    with pytest.raises(ModelError, match="at most 4294967296 bytes"):
        read(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors()))
    read(tmp_path)
