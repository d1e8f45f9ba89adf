# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The rotary settings of transformers 4 and 5; the reference is what the installed transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_ee.checkpoint.huggingface import read_backbone
from nemo_ee.families.registry import FAMILIES
from nemo_ee.families.rotary_settings import rotary_settings, with_both_spellings
from nemo_ee.runtime.exported_model import read_exported_model
from tests.helpers.huggingface_models import as_transformers_5_saves, reference_logits, save_tiny_model

# Controls show what the installed transformers does without the code under test, if it is as old as NeMo's.
IS_OLD = int(transformers.__version__.split(".")[0]) < 5
DEFAULT, LINEAR = {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("values", "kind", "base"),
    [
        ({}, DEFAULT, 10000.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, DEFAULT, 5e5),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR, 7.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, DEFAULT, 5e5),
        ({"rope_parameters": LINEAR, "rope_theta": 7.0}, LINEAR, 7.0),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}}, LINEAR, 7.0),
        ({"rope_parameters": {**LINEAR, "rope_theta": 7}, "rope_scaling": {}, "rope_theta": 7.0}, LINEAR, 7),
        ({"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2}}, LINEAR, 10000.0),
    ],
)
def test_either_spelling_and_both(values: dict, kind: dict, base: float) -> None:
    expected = {**kind, "rope_theta": base}
    assert rotary_settings(values) == expected
    both = with_both_spellings(values)
    assert rotary_settings({"rope_parameters": both["rope_parameters"]}) == expected
    assert rotary_settings({key: both[key] for key in ("rope_theta", "rope_scaling")}) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 10000.0 and rope_parameters.rope_th",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 3.0}},
            "rope_scaling .* and rope_parameters",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, "would compute different models; keep the one that"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "type 'linear' and rope_type 'llama3' disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set per kind of layer"),
        ({"rope_parameters": [1]}, r"rope_parameters: \[1\], must be a mapping"),
    ],
)
def test_spellings_that_disagree_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_settings(values)


@pytest.mark.parametrize("name", [*FAMILIES, "llama-linear", "llama-llama3"])
def test_a_config_of_transformers_5_describes_the_same_model(name: str, tmp_path: Path) -> None:
    changes = {"rope_theta": 5e5} if name in ("llama", "mistral") else {}
    model = save_tiny_model(tmp_path, name, **changes)
    importer, runtime = read_backbone(tmp_path), read_exported_model(tmp_path)
    as_transformers_5_saves(tmp_path)
    assert read_backbone(tmp_path) == importer and read_exported_model(tmp_path) == runtime
    values = json.loads((tmp_path / "config.json").read_text())
    tokens = model.dummy_inputs["input_ids"]
    expected = reference_logits(model, tokens)

    def loaded(values: dict[str, Any]) -> Any:
        config = type(AutoConfig.for_model(values["model_type"])).from_dict(values)
        return AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="eager").eval()

    if importer.learned_positions:
        assert "rope_parameters" not in values
        return
    assert reference_logits(loaded(with_both_spellings(values)), tokens).equal(expected)
    if IS_OLD:
        assert not reference_logits(loaded(values), tokens).equal(expected), "control: transformers 4 ignores the key"
