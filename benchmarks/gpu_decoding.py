# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: the runtime on a model of 1.1B parameters with random weights, beside transformers and beside the
time of reading the weights once. Part of scripts/gpu_check.py.

The confidence of random weights says nothing. So a token leaves at half the depth whatever its confidence (threshold
0), and every fourth goes deep (`max_pending_tokens=3`): the cost of leaving and of catching up is what is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_tuning import Sizes, kernels_of
from benchmarks.measure import interleaved, wait_for
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.exported_model import ExitEntry, ExportedModel
from nemo_ee.runtime.loader import model_of, stored_tensors
from nemo_ee.runtime.model import RuntimeModel

PROMPT = 64


class RandomTensors:
    """A `TensorSource` of random weights."""

    origin = "random weights"

    def __init__(self, exported: ExportedModel, device: str) -> None:
        self._table, self._device = stored_tensors(exported), device

    def pieces(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """See `TensorSource`."""
        shape = self._table[key].shape
        random = torch.randn(shape, device=self._device, dtype=torch.bfloat16) * 0.02
        yield key, random.fill_(1.0) if len(shape) == 1 else random


def runtime_model(sizes: Sizes, device: str) -> RuntimeModel:
    """The model, its exit at half the depth."""
    exits = (ExitEntry("half", sizes.model.num_layers // 2, "mlp", own_output=False),)
    exported = ExportedModel(sizes.model, exits, "bfloat16")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return model_of(exported, RandomTensors(exported, device), torch.device(device), dtype)


def measure(sizes: Sizes, device: str, copy_gb_s: float) -> dict[str, Any]:
    """Numbers of the JSON's `decoding`.

    Args:
        copy_gb_s: bytes that a copy on the device reads and writes in a second, 1e9.
    """
    model = runtime_model(sizes, device)
    engine, reference = EarlyExitEngine(model), _transformers(sizes, device)
    a = sizes.model
    size = 2 * (a.num_layers * (a.attention_size + a.mlp_size) + a.vocab_size * a.hidden_size)
    found: dict[str, Any] = {"weights_gb": size / 1e9, "read_s": size / 1e9 / copy_gb_s}
    generator = torch.Generator().manual_seed(1)
    policies = {"early_exit": ExitPolicy(0.0, max_pending_tokens=3), "static_depth": ExitPolicy(0.0)}
    new = sizes.new_tokens
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def ours(mode: str, prompts: Tensor) -> Any:
        result = engine.generate(prompts.tolist(), max_new_tokens=new, mode=mode, policy=policies.get(mode))
        wait_for(device)
        return result

    def theirs(prompts: Tensor) -> None:
        reference.generate(prompts.to(device), **length)
        wait_for(device)

    for batch in sizes.batches:
        prompts = torch.randint(2, a.vocab_size, (batch, min(PROMPT, sizes.length)), generator=generator)
        sides = {mode: partial(ours, mode, prompts) for mode in ("full", "early_exit", "static_depth")}
        times = interleaved({**sides, "transformers": partial(theirs, prompts)}, rounds=max(1, sizes.rounds // 2))
        for name, values in times.items():
            found[f"{name}_b{batch}_tokens_per_s"] = batch * new / statistics.median(values)
        found[f"mean_depth_b{batch}"] = ours("early_exit", prompts).stats.mean_depth
        full = found[f"full_b{batch}_tokens_per_s"]
        found[f"early_exit_over_full_b{batch}"] = found[f"early_exit_b{batch}_tokens_per_s"] / full
        found[f"runtime_over_transformers_b{batch}"] = full / found[f"transformers_b{batch}_tokens_per_s"]
        found[f"full_over_reading_b{batch}"] = full / batch * found["read_s"]
    found["launches_per_token"] = _launches(engine, given=[prompts.tolist()[0]], device=device)
    return found


def _transformers(sizes: Sizes, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    a = sizes.model
    config = LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_query_groups, max_position_embeddings=a.max_position_embeddings,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if device != "cpu" else torch.float32).eval()


def _launches(engine: EarlyExitEngine, *, given: list[list[int]], device: str) -> float:
    """Kernels that the device runs for one token at full depth and batch 1."""
    if device == "cpu":
        return 0.0
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for new in (2, 10):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            engine.generate(given, max_new_tokens=new, mode="full")
            wait_for(device)
        rows = [row for row in kernels_of(profiler) if not row.key.startswith(("Memcpy", "Memset"))]
        counts.append(sum(row.count for row in rows))
    return (counts[1] - counts[0]) / 8
