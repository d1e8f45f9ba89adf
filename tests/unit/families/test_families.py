# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every family says of itself, against the transformers library: keys, defaults, classes, names and shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

from transformers import AutoConfig, AutoModelForCausalLM

from nemo_ee.families.architecture import FC1, QKV, Architecture
from nemo_ee.families.registry import FAMILIES, engine_family, read_config, tensors_of
from nemo_ee.families.tensors import Stored, TensorTable
from tests.helpers.huggingface_models import TINY_MODELS, tiny_model


def described(model: Any) -> dict[str, Any]:
    """The config.json that transformers writes."""
    return json.loads(model.config.to_json_string())


def stored_tensors(table: TensorTable, layer: str, num_layers: int) -> dict[str, Stored]:
    """Full name -> every tensor that the table reads."""
    found = {stored.name: stored for tensor in table.others.values() for stored in tensor.stored}
    for tensor in table.layer.values():
        found |= {layer.format(index) + s.name: s for s in tensor.stored for index in range(num_layers)}
    return found


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_tensors_are_those_of_the_class(name: str) -> None:
    """Names and shapes of all parameters, and every row of each is read exactly once."""
    model = tiny_model(name)
    architecture = read_config(described(model))
    table, family = tensors_of(architecture), FAMILIES[architecture.family]
    stored = stored_tensors(table, family.names.layer, architecture.num_layers)
    assert {own: tensor.shape for own, tensor in stored.items()} == {
        own: tuple(parameter.shape) for own, parameter in model.named_parameters()
    }
    for tensor in (*table.layer.values(), *table.others.values()):
        assert sum(rows.stop - rows.start for rows in tensor.rows) == tensor.shape[0]
        for own in tensor.stored:
            places = sorted((rows.start, rows.stop) for rows in tensor.rows if rows.stored == own)
            height = own.shape[-1 if own.transposed else 0]
            skipped = family.names.position_offset if own.name == family.names.positions else 0
            assert [skipped, *(stop for _, stop in places)] == [*(start for start, _ in places), height], own.name


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_written_is_read_again(name: str) -> None:
    """By the family's own reader, and by transformers as the same class of the same sizes."""
    model = tiny_model(name)
    architecture = read_config(described(model))
    family = FAMILIES[architecture.family]
    values = family.stock_config(architecture.completed())
    again = read_config(values)
    named = {field for field, _, _ in architecture.completed().differences(again.completed())}
    assert named == set()
    config = AutoConfig.for_model(**values)
    assert type(config).__name__ == family.config_class
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == family.model_class == values["architectures"][0]
    other = read_config(values | {"vocab_size": 7, family.keys["num_layers"]: 5})
    assert [field for field, *_ in again.differences(other)] == ["num_layers", "vocab_size"], "control"


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_mean_what_they_mean_to_transformers(name: str, tmp_path: Path) -> None:
    """A config.json of sizes alone; what it leaves out is compared with a whole one from transformers."""
    family, sizes = FAMILIES[name], Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=32, num_query_groups=32, kv_channels=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    bare = {key: value for key, value in family.stock_config(sizes).items() if isinstance(value, int) and value > 1}
    for key in ("num_key_value_heads", "head_dim"):
        bare.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **bare}))
    whole = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    assert whole.keys() - bare.keys() > {"tie_word_embeddings"}
    ours, theirs = read_config({"model_type": name, **bare}), read_config(whole)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)


def test_the_engine_family_of_an_architecture() -> None:
    """One class computes each; where a bias or a norm is of a kind that none has, none does."""
    sizes = read_config(described(tiny_model("llama")))
    for changes, expected in (
        ({}, "LlamaForCausalLM"),
        ({"biases": frozenset({QKV})}, "Qwen2ForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "biases": frozenset({QKV})}, None),
        ({"layer_norm": True, "hidden_act": "relu", "biases": frozenset({FC1})}, "OPTForCausalLM"),
        ({"layer_norm": True, "hidden_act": "gelu", "biases": frozenset({FC1})}, "GPTForCausalLM"),
    ):
        family = engine_family(dataclasses.replace(sizes, **changes))
        assert (family and family.engine.architecture) == expected
