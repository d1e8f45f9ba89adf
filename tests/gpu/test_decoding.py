# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding an export on a device: transformers' tokens, the CPU's exits."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from tests.helpers.huggingface_models import save_tiny_model

EXPORT = Path(__file__).resolve().parents[1] / "data" / "earlier" / "export" / "hf_early_exit"
NEW, LENGTHS = 24, (7, 1, 12)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def test_full_depth_has_the_tokens_of_transformers(device: torch.device, tmp_path: Path) -> None:
    theirs = save_tiny_model(tmp_path, "llama-llama3").to(device)
    model = load_model(tmp_path, device=device, dtype="float32")
    given = prompts(theirs.config.vocab_size)
    ours = EarlyExitEngine(model).generate(given, max_new_tokens=NEW, mode="full")
    for prompt, tokens in zip(given, ours.tokens, strict=True):
        inputs = torch.tensor([prompt], device=device)
        expected = theirs.generate(inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=1)
        assert list(tokens) == expected[0, len(prompt) :].tolist()


def test_exits_are_those_of_the_cpu(device: torch.device) -> None:
    leaving = set()
    for threshold in (0.0, 0.02, 0.05, 0.2):
        found = []
        for place in ("cpu", device):
            model = load_model(EXPORT, device=place, dtype="float32")
            engine, policy = EarlyExitEngine(model), ExitPolicy(threshold)
            given = prompts(model.vocab_size)
            early = engine.generate(given, max_new_tokens=NEW, policy=policy)
            found.append([(event.sequence, event.token, event.exit) for event in early.events])
            full = engine.generate(given, max_new_tokens=NEW, mode="full")
            drafted = engine.generate(given, max_new_tokens=NEW, mode="self_speculative", policy=policy)
            assert drafted.tokens == full.tokens
        assert found[0] == found[1]
        leaving.add(sum(exit is not None for _, _, exit in found[1]) / len(found[1]))
    assert len(leaving) > 2 and any(0 < share < 0.8 for share in leaving), "control: thresholds decide"


def test_half_precision_runs(device: torch.device) -> None:
    model = load_model(EXPORT, device=device, dtype="bfloat16")
    result = EarlyExitEngine(model).generate(prompts(model.vocab_size), max_new_tokens=NEW, policy=ExitPolicy(0.02))
    assert [len(tokens) for tokens in result.tokens] == [NEW] * len(LENGTHS)


def test_the_reference_is_not_trivial() -> None:
    """Control: greedy text of the random model is not one token over and over."""
    model = load_model(EXPORT)
    result = EarlyExitEngine(model).generate(prompts(model.vocab_size), max_new_tokens=NEW, mode="full")
    assert all(len(set(tokens)) > 2 for tokens in result.tokens)
