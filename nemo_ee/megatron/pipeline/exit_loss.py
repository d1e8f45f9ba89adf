# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forward, loss and backward of one exit on one microbatch: its graph lives here and nowhere else.

Losses travel as (sum, count) and are divided once, when they are logged (see `TokenSums`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nemo_ee.megatron.loss.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from nemo_ee.megatron.loss.teacher import Teacher
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline.stage_context import StageContext


def exit_terms(
    head: ExitHead, tap: Tensor, batch: MicroBatch, rotary_pos_emb: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """An exit's output projection of one microbatch as a sum of products.

    Args:
        head: the exit.
        tap: [s, b, h] hidden state at its tap ([s/tp, b, h] under sequence parallelism).
        batch: the microbatch.
        rotary_pos_emb: the stage's rotary embedding, read by `layer` exits.

    Returns:
        Inputs, each [s * b, n], and weights, each [v/tp, n], of the terms.
    """
    hidden = head(tap, attention_mask=batch.attention_mask, rotary_pos_emb=rotary_pos_emb)
    inputs, weights = zip(*head.output_terms(hidden), strict=True)
    return [x.flatten(0, 1) for x in inputs], list(weights)


def tune_exit(
    context: StageContext,
    head: ExitHead,
    batch: MicroBatch,
    output: StageOutput,
    *,
    grad_scale: float,
    teacher: Teacher | None = None,
) -> LinearCrossEntropy:
    """One exit's forward, loss and backward. Gradients are added to the head's parameters; none reaches the tap.

    Args:
        context: the exit's stage.
        head: the exit.
        batch: the microbatch.
        output: output of the stage's layers for it.
        grad_scale: factor on the gradient of the summed loss.
        teacher: the final exit's distributions; read if the exit's objective has a teacher.
    """
    objective = context.objectives[head.exit.name]
    with torch.enable_grad(), context.mixed_precision():
        inputs, weights = exit_terms(head, output.taps[head.exit.stop].detach(), batch, output.rotary_pos_emb)
    result = linear_cross_entropy(
        inputs,
        weights,
        *batch.flat_labels(),
        vocabulary=context.model.vocabulary(),
        objective=objective,
        teacher=teacher if objective.has_teacher else None,
        grad_scale=grad_scale,
        dtype=context.autocast,
        chunk_bytes=context.chunk_bytes,
    )
    used = [(x, grad) for x, grad in zip(inputs, result.input_grads, strict=True) if grad is not None]
    if used:
        with context.mixed_precision(backward=True):
            torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
    return result


@torch.no_grad()
def evaluate_exit(
    context: StageContext,
    head: ExitHead,
    batch: MicroBatch,
    output: StageOutput,
    *,
    want_argmax: bool,
    teacher: Teacher | None = None,
) -> LinearCrossEntropy:
    """One exit's label cross-entropy and entropy without gradients.

    `want_argmax` adds its most likely tokens, [s * b], and a teacher the divergence from it, for exits whose objective
    has one. See `tune_exit`.
    """
    objective = context.objectives[head.exit.name]
    with context.mixed_precision():
        inputs, weights = exit_terms(head, output.taps[head.exit.stop], batch, output.rotary_pos_emb)
    return linear_cross_entropy(
        inputs,
        weights,
        *batch.flat_labels(),
        vocabulary=context.model.vocabulary(),
        objective=replace(objective, label_weight=1.0, teacher_weight=0.0, by_confidence=False),
        teacher=teacher if objective.has_teacher else None,
        want_argmax=want_argmax,
        want_entropy=True,
        dtype=context.autocast,
        chunk_bytes=context.chunk_bytes,
    )
