# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A generation request without prompts, for scoring and evaluation harnesses, which have their own texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_ee.commands.generation_request import GenerationRequest

# Keys of conf/megatron_gpt_early_exit_generate.yaml that a request without prompts does not set.
_OPEN = {
    "prompts": ["x"],  # placeholder for the texts, each of which the engine checks
    "prompts_file": None,
    "output": None,
    "overwrite": False,
    "colour": "never",
    "tokens_to_generate": 1,
    "min_tokens_to_generate": 0,
    "stop_on_eos": False,
    "end_strings": [],
    "certificate": None,
    "allow_other_setting": False,
    "greedy": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "cost_rule": "none",
    "cost_table": None,
    "num_draft_tokens": None,
    "draft_rule": "fixed",
}


def model_settings(path: str, backbone_path: str | None, tensor_model_parallel_size: int) -> dict[str, Any]:
    """The `model` block that `open_generator` reads, for scoring."""
    return {
        "restore_from_path": path,
        "backbone_path": backbone_path,
        "verify": "stored",
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": 1,
        "transformer_engine": None,
        "distributed_timeout_minutes": 30,
        "layer_split": None,
    }


def scoring_request(config: Mapping[str, Any]) -> GenerationRequest:
    """A checked request without prompts.

    Args:
        config: mode, criterion, threshold, exits, max_pending_tokens, num_draft_tokens (may be absent), add_BOS,
            batch_size, and the blocks trainer and model, each as in conf/megatron_gpt_early_exit_generate.yaml.

    Raises:
        ValueError: every problem, in one message.
    """
    trainer = {"accelerator": "auto", **config["trainer"]}
    return GenerationRequest.from_config({**_OPEN, **config, "trainer": trainer}).model_copy(
        update={"given_prompts": ()}
    )
