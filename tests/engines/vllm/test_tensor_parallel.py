# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks give the runtime's tokens, and leave at the same exits where they choose by time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.propagation import generate_propagating
from tests.engines.vllm.engine import generate, save_model, served

PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97]]


def test_two_ranks(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    thresholds = 0.06
    expected = generate_propagating(
        load_model(tmp_path), PROMPTS, max_new_tokens=[20] * 3, policy=ExitPolicy(thresholds), row_by_row=True
    )
    assert len({exit for own in expected.exits for exit in own}) >= 3, "control: several exits are used"
    settings = {"thresholds": thresholds, "only_if_faster": False}
    with served(tmp_path, settings, tensor_parallel_size=2, enforce_eager=False) as llm:
        assert generate(llm, PROMPTS, [20] * 3, [None] * 3) == [list(own) for own in expected.tokens]
    with served(tmp_path, {"thresholds": thresholds}, tensor_parallel_size=2) as llm:
        assert [len(own) for own in generate(llm, PROMPTS, [100] * 3, [None] * 3)] == [100] * 3
