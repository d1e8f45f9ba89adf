# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of a few tuning steps on one device, in a process of its own.

    python -m tests.gpu.step_numbers <Hugging Face directory> <cpu|cuda> <float32|bfloat16> <output>

The output is a torch file: logits of the full model, losses of each step by exit, exits before and after the steps.
The groups are of one rank, on NCCL or gloo.
"""

from __future__ import annotations

import sys

import torch

STEPS, LENGTH, BATCH, LEARNING_RATE = 4, 24, 2, 1e-3
EXITS = [
    {"name": "mlp1", "layer": 1, "architecture": "mlp", "objective": "distillation"},
    {"name": "layer2", "layer": 2, "architecture": "layer", "objective": "mixed"},
    {"name": "low2", "layer": 2, "architecture": "norm", "output": "low_rank", "rank": 4},
    {"name": "lora3", "layer": 3, "architecture": "mlp", "init": "lora", "rank": 4, "output": "shared"},
]


def main(directory: str, device: str, dtype: str, output: str) -> None:
    """Write the numbers."""
    if device == "cpu":
        from nemo_ee import cpu_host

        cpu_host.enable()
    from benchmarks.gpu_groups import one_rank
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from nemo_ee.checkpoint.megatron_model import load_stage, stage_of
    from nemo_ee.exits.config import EarlyExitConfig
    from nemo_ee.exits.placement import place_exits
    from nemo_ee.megatron.model.microbatch import MicroBatch
    from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner
    from nemo_ee.megatron.pipeline.stage_forward import full_model_logits

    one_rank(device)
    source, dtype = HuggingFaceSource(directory), getattr(torch, dtype)
    num_layers = source.backbone.num_layers
    early_exit = EarlyExitConfig.from_mapping({"exits": EXITS}, num_layers=num_layers)
    stages = place_exits(early_exit.exits, num_layers=num_layers, num_stages=1, full_depth=True)
    model = stage_of(
        source.backbone, early_exit, stages, use_cpu_initialization=device == "cpu", params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )  # fmt: skip
    model.to(device)
    load_stage(model, source, None, early_exit=early_exit, seed=1)
    optim = {"name": "adamw", "lr": LEARNING_RATE}
    tuner = ExitTuner(model, early_exit, stages, optim=optim, num_steps=STEPS, max_norm=1.0)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, source.backbone.vocab_size, (BATCH, LENGTH), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device).expand_as(tokens)
    batch = MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(tokens.shape, device=device), positions)
    numbers = {"logits": full_model_logits(tuner.context, tokens).cpu()}
    numbers["start"] = {name: value.detach().float().cpu().clone() for name, value in model.exits.named_parameters()}
    numbers["losses"] = [{name: row["loss"] for name, row in tuner.tune([batch]).items()} for _ in range(STEPS)]
    numbers["exits"] = {name: value.detach().float().cpu() for name, value in model.exits.named_parameters()}
    torch.save(numbers, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
