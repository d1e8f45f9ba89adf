# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every directory of an export computes in the installed transformers what it computes in 4.51, for every family.

Logits in fp32, 1e-5 of the largest; tokens and exits exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from tests.helpers.huggingface_models import TINY_MODELS, reference_logits, save_tiny_model

pytestmark = pytest.mark.parametrize("name", TINY_MODELS)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()).item()


def new_tokens(model: Any, prompt: list[int], length: int, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "do_sample": False, "pad_token_id": 1}
    model.generation_config.eos_token_id = None
    return model.generate(ids, **call, **settings)[0, len(prompt) :].tolist()


def test_stock_directories(name: str, exports: Path) -> None:
    folder = exports / "models" / name
    reference, logits = (
        json.loads((folder / "reference.json").read_text()),
        load_file(folder / "reference.safetensors"),
    )
    assert len(logits) >= 5
    for directory, expected in logits.items():
        model, report = AutoModelForCausalLM.from_pretrained(folder / directory, output_loading_info=True)
        assert not any(report.values()), report
        assert close(reference_logits(model.float().eval(), torch.tensor(reference["tokens"])), expected), directory
        if directory == "hf_full":
            for prompt, tokens in zip(reference["prompts"], reference["greedy"], strict=True):
                assert new_tokens(model, prompt, len(tokens)) == tokens
        else:
            assert not close(expected, logits["hf_full"]), "control"


def test_early_exit_directory(name: str, exports: Path) -> None:
    """`trust_remote_code`: logits and greedy tokens are hf_full's, tokens with early exit those of 4.51."""
    folder = exports / "models" / name
    reference, logits = (
        json.loads((folder / "reference.json").read_text()),
        load_file(folder / "reference.safetensors"),
    )
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / "hf_early_exit", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model).__name__ == "EarlyExitForCausalLM"
    assert close(reference_logits(model, torch.tensor(reference["tokens"])), logits["hf_full"])
    for row, prompt in enumerate(reference["prompts"]):
        expected = reference["greedy"][row]
        assert new_tokens(model, prompt, len(expected)) == expected
        call = {"attention_mask": torch.ones((1, len(prompt)), dtype=torch.int64), "max_new_tokens": len(expected)}
        tokens, result = model.generate(
            torch.tensor([prompt]), **call, early_exit_threshold=reference["thresholds"], return_result=True
        )
        assert tokens[0, len(prompt) :].tolist() == reference["early_exit"][row]
        assert [event.exit for event in result.events] == reference["exits"][row]
        full, result = model.generate(torch.tensor([prompt]), **call, return_result=True)
        assert full[0, len(prompt) :].tolist() == expected and {event.exit for event in result.events} == {None}
    plain = AutoModelForCausalLM.from_pretrained(folder / "hf_early_exit")
    assert type(plain).__name__ != "EarlyExitForCausalLM", "without trust_remote_code it is the stock class"


def test_the_runtime(name: str, exports: Path, tmp_path: Path) -> None:
    """It decodes the export, and a directory that the installed transformers saved."""
    folder = exports / "models" / name
    reference = json.loads((folder / "reference.json").read_text())
    engine = EarlyExitEngine(load_model(folder / "hf_early_exit"))
    call = {"max_new_tokens": len(reference["greedy"][0]), "policy": ExitPolicy(reference["thresholds"])}
    assert [list(own) for own in engine.generate(reference["prompts"], **call).tokens] == reference["early_exit"]
    saved = save_tiny_model(tmp_path, name)
    engine = EarlyExitEngine(load_model(tmp_path))
    tokens = engine.generate(reference["prompts"], max_new_tokens=12, mode="full").tokens
    assert [list(own) for own in tokens] == [new_tokens(saved, prompt, 12) for prompt in reference["prompts"]]
