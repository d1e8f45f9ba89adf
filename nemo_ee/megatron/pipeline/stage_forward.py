# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Logits of the full model under any layout, for checks."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn.functional import linear

from nemo_ee.megatron.model.low_rank import spread_over_tensor_parallel
from nemo_ee.megatron.pipeline.exit_loss import MicroBatch
from nemo_ee.megatron.pipeline.tuning_step import run_microbatches


@torch.no_grad()
def full_model_logits(model, tokens: Tensor) -> Tensor | None:
    """Logits of a full-depth model. Every rank must call it with the same tokens.

    Args:
        model: `MegatronEarlyExitGPTModel` with full depth.
        tokens: [b, s] int64.

    Returns:
        [b, s, vocab_size] fp32 on the last pipeline stage, None on the others.
    """
    gpt = model.model
    tokens = tokens.to(model.device)
    positions = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    batch = MicroBatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32), positions)
    result: list[Tensor] = []

    def work(index: int, stage, teacher) -> None:
        if gpt.post_process:
            hidden = spread_over_tensor_parallel(stage.hidden, gpt.config)
            weight = gpt.backbone_output_weight()
            logits = linear(hidden.to(weight.dtype), weight)
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            result.append(logits[..., : model.vocab_size].transpose(0, 1).float())

    run_microbatches(gpt, [batch], link=model.link, work=work, autocast=None)
    model.link.drain()
    return result[0] if result else None
