"""Speculation beside other engines: the merged checkpoint, what is made of the figures, and the engines themselves
where they are installed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenloom import LLM, SamplingParams
from tokenloom.embedded import ADAPTERS
from tokenloom.kernels.native import extension

SPEC = {"threads": 2, "quick": True, "rounds": 2, "max_other": 1e9, "attempts": 1, "patience_s": 0.0}


@pytest.fixture
def peers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "bench"))
    monkeypatch.syspath_prepend(str(repository / "bench" / "peers"))
    import guessing.peers

    return guessing.peers


RATES = {"plain": 100.0, "steady": 250.0, "hasty": 400.0}
"""Tokens a second of the fake peer."""


class FakePeer:
    """Gives ten tokens for each prompt, in a time that the setting decides."""

    settings = ("steady", "hasty")

    def __init__(self, decoded: Any) -> None:
        self._decoded = decoded
        self.asked: list[tuple[str, int]] = []

    def decode(self, setting: str, prompts: list[list[int]], max_tokens: int) -> Any:
        self.asked.append((setting, len(prompts)))
        outputs = [[7] * 10 for _ in prompts]
        if setting == "hasty":
            outputs[0] = [7] * 9 + [8]
        steps = 9 * len(prompts) if setting == "plain" else 3 * len(prompts)
        return self._decoded(outputs, 9 * len(prompts) / RATES[setting], steps)

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}


@pytest.mark.skipif(bool(extension.missing()), reason="the numpy reference would take minutes")
def test_our_gain_is_set_against_the_best_setting_of_a_peer(peers: ModuleType, embedded_model: Path) -> None:
    models = peers.Models(embedded_model, embedded_model.with_name("draft"))
    fake = FakePeer(peers.Decoded)
    found = peers.measure_workload(SPEC, "story", models, {"fake": fake})
    assert found["best"] == {"fake": "hasty"}
    assert found["gains"]["fake"] == pytest.approx(4.0)
    assert found["over"]["fake"] == pytest.approx(found["gains"]["tokenloom"] / 4.0)
    assert found["texts_unchanged"] == {"fake steady": 1.0, "fake hasty": 0.75}
    assert found["like_ours"]["fake"] < 0.1
    assert found["versions"] == {"fake": "1"}
    medians = found["medians"]
    assert medians["fake plain"] == {"decode_tok_s": 100.0, "tokens_per_step": 1.0}
    assert medians["fake steady"]["tokens_per_step"] == 3.0
    # Ours is real: the draft is right about the target now and then, and more often the less far it looks ahead.
    assert medians["tokenloom plain"]["tokens_per_step"] == 1.0
    assert 1.5 < medians["tokenloom chain 2"]["tokens_per_step"] <= 3.0
    plain, guessed = (
        [
            entry["figures"]["decode_tok_s"]
            for entry in found["rounds"]
            if entry["case"] == f"tokenloom {name}"
        ]
        for name in ("plain", "adaptive")
    )
    ratios = sorted(b / a for a, b in zip(plain, guessed, strict=True))
    assert found["gains"]["tokenloom"] == pytest.approx(sum(ratios) / 2)
    # A warm-up with other prompts, then both rounds with the same ones.
    assert [count for setting, count in fake.asked if setting == "hasty"] == [2, 4, 4]


@pytest.mark.skipif(bool(extension.missing()), reason="the numpy reference would take minutes")
def test_a_text_that_guessing_changes_is_an_error(
    peers: ModuleType, embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = peers._ours

    def broken(engine: Any, speculator: Any) -> Any:
        decode = ours(engine, speculator)
        if not speculator.sources or speculator.limits.max_depth != 4:
            return decode
        return lambda prompts, max_tokens: decode(prompts, max_tokens - 1)

    models = peers.Models(embedded_model, None)
    work = peers.Workload([[9, 8, 7, 9, 8]], [[9, 8]], 8)
    monkeypatch.setattr(peers, "_ours", broken)
    monkeypatch.setattr(peers, "_workload", lambda *_: work)
    with pytest.raises(RuntimeError, match="tokenloom chain 4: the text changed"):
        peers.measure_workload(SPEC, "copy", models, {})


def test_how_far_two_texts_go_together(peers: ModuleType) -> None:
    assert peers._common([1, 2, 3], [1, 2, 3]) == 3
    assert peers._common([1, 2, 3], [1, 5, 3]) == 1
    assert peers._common([1, 2], [1, 2, 3]) == 2
    assert peers._common([4], []) == 0


def test_the_merged_checkpoint_is_that_of_peft(
    peers: ModuleType, embedded_model: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    peers.merge_adapter(embedded_model, ADAPTERS["repeat"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(base, ADAPTERS["repeat"]).merge_and_unload().state_dict()
    changed = load_file(embedded_model / "model.safetensors")
    assert merged.keys() == changed.keys()
    assert all(torch.equal(merged[name], wanted[name].to(torch.bfloat16)) for name in merged)
    assert sum(not torch.equal(merged[name], changed[name]) for name in merged) == 35
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in embedded_model.iterdir()
    }


@pytest.mark.parametrize(
    ("field", "value"), [("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 4})]
)
def test_only_plain_lora_is_merged(
    peers: ModuleType, embedded_model: Path, tmp_path: Path, field: str, value: Any
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(ADAPTERS["repeat"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=field):
        peers.merge_adapter(embedded_model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_is_made_anew_when_what_it_is_made_of_changes(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.install, "MODELS", tmp_path / "models")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("1")
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()

    first = peers._kept("x", [source], make)
    assert peers._kept("x", [source], make) == first and first.is_dir()
    (source / "config.json").write_text("2")
    assert peers._kept("x", [source], make) != first
    assert len(made) == 2


def test_what_is_not_installed_is_refused_by_name(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import speculation

    monkeypatch.setattr(speculation.variants, "WORK", tmp_path)
    monkeypatch.setattr(speculation.variants, "LLAMA_CPP", tmp_path / "bin")
    for names, wanted in {
        "openvino": "openvino is not installed (bench/peers/install.py does): no envs/openvino/bin/python",
        "llamacpp": "no bin/llama-server, envs/transformers/bin/python",
        "vllm": "'vllm' is not one of openvino, llamacpp",
        "": "'' is not one of",
    }.items():
        monkeypatch.setattr(sys, "argv", ["speculation.py", "--parts", "none", "--peers", names])
        with pytest.raises(SystemExit) as refused:
            speculation.parse_arguments()
        assert refused.value.code == 2
        assert wanted in capsys.readouterr().err


def test_a_worker_that_ends_is_an_error(
    peers: ModuleType, embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guessing import peer_engines
    from variants import Variant

    def here(engine: str, checkpoint: Path, threads: int) -> Variant:
        return Variant(engine, "bf16", engine, Path(sys.executable), checkpoint / "nothing")

    monkeypatch.setattr(peer_engines, "_variant", here)
    with pytest.raises(RuntimeError, match=r"openvino_worker.py ended with 1"):
        peer_engines.OpenVino(peer_engines.Models(embedded_model, None), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "llamacpp"])
@pytest.mark.parametrize("workload", ["story", "copy"])
def test_a_peer_that_is_installed_runs_the_same_model(peers: ModuleType, name: str, workload: str) -> None:
    from guessing import peer_engines

    if missing := peer_engines.missing(name):
        pytest.skip(f"{name} is not installed in bench/peers/.work: no {missing}")
    models = peers.WORKLOADS[workload]()
    for checkpoint in models:
        if checkpoint is not None:
            peers.install.convert(name, checkpoint.name, "bf16")
    with LLM(str(models.target)) as llm:
        texts = ["Tell me a story about a dog.", "Repeat this text:\nKing lake duck hat. King lake frog."]
        tokenizer = llm.get_tokenizer()
        prompts = [
            tokenizer.encode(
                tokenizer.render_chat([{"role": "user", "content": text}]), add_special_tokens=False
            )
            for text in texts
        ]
        ours = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=12),
            progress=False,
        )
    peer = peer_engines.ENGINES[name](models, 2)
    try:
        plain = peer.decode("plain", prompts, 12)
        assert plain.steps == plain.num_tokens and plain.seconds > 0
        assert [tokens[0] for tokens in plain.token_ids] == [each.outputs[0].token_ids[0] for each in ours]
        for setting in peer.settings:
            guessed = peer.decode(setting, prompts, 12)
            assert 0 < guessed.steps <= guessed.num_tokens
            assert [tokens[0] for tokens in guessed.token_ids] == [tokens[0] for tokens in plain.token_ids]
        assert peer.versions()
    finally:
        peer.close()
