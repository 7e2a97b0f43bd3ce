"""Mixtures of experts whose linears are stored in fewer bits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.models.format_fixtures import EXPERTS, STORED, make_experts
from tests.models.hf_fixtures import write_model
from tests.models.test_native_weights import load, logits
from tokenloom.errors import ModelError
from tokenloom.models.loading import load_model

W1 = "model.layers.0.block_sparse_moe.experts.3.w1"


@pytest.mark.parametrize("name", sorted(STORED.keys() - {"gptq ordered"}))
def test_logits_are_those_of_the_float_twin(tmp_path: Path, name: str) -> None:
    packed, plain, config = make_experts(STORED[name])
    directory = write_model(tmp_path / "packed", config, packed)
    expected = logits(load_model(write_model(tmp_path / "plain", EXPERTS, plain)), "reference")
    most = np.abs(expected).max()
    assert np.abs(logits(load_model(directory), "reference") - expected).max() < 2e-3 * most
    found = logits(load(directory), "native")
    # The integer kernels round each row of activations to 8 bits.
    assert np.abs(found - expected).max() < (1e-4 if STORED[name].form == "float" else 0.05) * most
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_reordered_inputs_of_experts_are_refused(tmp_path: Path) -> None:
    packed, _, config = make_experts(STORED["gptq ordered"])
    directory = write_model(tmp_path, config, packed)
    for start in (load_model, load):
        with pytest.raises(ModelError, match=rf"{W1}\.weight with reordered inputs \(desc_act\)"):
            start(directory)


@pytest.mark.parametrize("kept", ["experts.3.", "experts.3.w1", "experts.3.w2"])
@pytest.mark.parametrize("name", ["packed 4", "int8", "fp8 block"])
def test_experts_of_a_layer_must_be_alike(tmp_path: Path, name: str, kept: str) -> None:
    packed, _, config = make_experts(STORED[name], lambda tensor: kept in tensor)
    written = config["quantization_config"]
    if "ignore" in written:
        written["ignore"].append(f"re:.*{re.escape(kept)}")
    else:
        written["modules_to_not_convert"].append(kept)
    directory = write_model(tmp_path, config, packed)
    if STORED[name].form == "float":  # as the others are, once they are unpacked
        load(directory)
        return
    for start in (load_model, load):
        with pytest.raises(
            ModelError, match=rf"experts\.3\..* stored as float.*{STORED[name].form}: the experts of a"
        ):
            start(directory)
