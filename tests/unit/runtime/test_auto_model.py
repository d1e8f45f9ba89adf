# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit for a class of transformers, against that class and the runtime on the same directory.

tests/stack/transformers/ has what a user types, under every version; this is the core of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.auto_model import EarlyExitGeneration
from nemo_ee.runtime.loader import load_model
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.propagation_reference import save_early_exit_directory

PROMPT = torch.tensor([[5, 71, 13, 9, 0, 44]])
CALL = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


class EarlyExitLlama(EarlyExitGeneration, LlamaForCausalLM):
    """As the export writes it into `hf_early_exit`."""


class EarlyExitGPT2(EarlyExitGeneration, GPT2LMHeadModel):
    """The same for GPT-2."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_early_exit_directory(tmp_path, "llama", [("mlp", 1, True), ("norm", 2, False)])
    return tmp_path


def test_tokens_are_the_class_s_and_the_runtime_s(directory: Path) -> None:
    stock, model = LlamaForCausalLM.from_pretrained(directory), EarlyExitLlama.from_pretrained(directory)
    greedy = stock.generate(PROMPT, do_sample=False, **CALL)
    assert torch.equal(model.generate(PROMPT, do_sample=False, **CALL), greedy)
    full, result = model.generate(PROMPT, **CALL, return_result=True)
    assert torch.equal(full, greedy) and result.stats.mean_depth == 3
    early, result = model.generate(PROMPT, early_exit_threshold=0.02, **CALL, return_result=True)
    runtime = EarlyExitEngine(load_model(directory))
    expected = runtime.generate(PROMPT.tolist(), max_new_tokens=12, policy=ExitPolicy(0.02))
    assert result.tokens == expected.tokens and len({event.exit for event in result.events}) > 1
    assert early[0, 6:].tolist() == list(expected.tokens[0]) and not torch.equal(early, greedy), "control"


def test_parameters_have_the_names_of_the_files(directory: Path, tmp_path: Path) -> None:
    model, report = EarlyExitLlama.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()) and "exit_heads.layer1-mlp.mlp.up_proj.weight" in model.state_dict()
    folder = tmp_path / "gpt2"
    save_tiny_model(folder, "gpt2")
    config = json.loads((folder / "config.json").read_text())
    entry = {"name": "deep", "layer": 2, "architecture": "layer", "output": "backbone"}
    (folder / "config.json").write_text(json.dumps(config | {"early_exit": {"exits": [entry]}}))
    head = dict(EarlyExitGPT2.from_pretrained(folder).exit_heads.named_parameters())
    assert head["deep.layer.attn.c_attn.weight"].shape == (24, 72), "as GPT-2 stores it"
    (folder / "config.json").write_text(json.dumps(config | {"early_exit": {"exits": [entry | {"name": "half"}]}}))
    with pytest.raises(ValueError, match="exit 'half': torch has a method of this name"):
        EarlyExitGPT2.from_pretrained(folder)


def test_a_changed_parameter_is_decoded(directory: Path) -> None:
    model = EarlyExitLlama.from_pretrained(directory)
    before, engine = model.generate(PROMPT, early_exit_threshold=0.02, **CALL), model.engine
    assert model.engine is engine
    model.lm_head.weight.data.neg_()
    assert model.engine is not engine
    assert not torch.equal(model.generate(PROMPT, early_exit_threshold=0.02, **CALL), before)


def test_half_precision_that_was_loaded_as_fp32_is_computed_as_such(directory: Path) -> None:
    model = EarlyExitLlama.from_pretrained(directory)
    assert type(model.engine.model.weights.layers[0].proj).__name__ == "PlainLinear"
    rounded = model.to(torch.bfloat16).to(torch.float32)
    assert "Half" in type(rounded.engine.model.weights.layers[0].proj).__name__
    greedy = rounded.generate(PROMPT, do_sample=False, **CALL)
    assert torch.equal(rounded.generate(PROMPT, **CALL, return_result=True)[0], greedy)


def test_ends_and_padding_are_generation_config_s(tmp_path: Path) -> None:
    """Several end tokens, none of them config.json's; against transformers' `generate` on the same directory."""
    reference = save_tiny_model(tmp_path, "llama")
    vocabulary = reference.config.vocab_size
    prompts = torch.randint(0, vocabulary, (3, 5), generator=torch.Generator().manual_seed(5))
    call: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    free = reference.generate(prompts, eos_token_id=None, pad_token_id=0, **call)
    ends = {"eos_token_id": [free[0, 8].item(), free[1, 11].item(), vocabulary + 7], "pad_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    model = EarlyExitLlama.from_pretrained(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(tmp_path).generate(prompts, **call)
    assert (expected[0, 9:] == 3).all() and not torch.equal(expected, free[:, : expected.shape[1]]), "control"
    assert torch.equal(model.generate(prompts, **call, return_result=True)[0], expected)


def test_more_tokens_than_positions(directory: Path) -> None:
    model = EarlyExitLlama.from_pretrained(directory)
    with pytest.raises(ValueError, match="33 prompt tokens .* are more than the model's 32 positions"):
        model.generate(torch.zeros((1, 33), dtype=torch.int64), early_exit_threshold=0.5, max_new_tokens=1)


def test_another_way_to_decode_is_not_silent(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later transformers that calls its loop otherwise."""
    model = EarlyExitLlama.from_pretrained(directory)
    monkeypatch.setattr(EarlyExitGeneration, "_sample", lambda self, input_ids, *_, **__: input_ids)
    with pytest.raises(RuntimeError, match="did not decode with early exit"):
        model.generate(PROMPT, early_exit_threshold=0.5, **CALL)
