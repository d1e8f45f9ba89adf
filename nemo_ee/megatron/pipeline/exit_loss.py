# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forward, loss and backward of one exit on one microbatch: its graph lives here and nowhere else.

Losses travel as (sum, count) and are divided once, when they are logged (see `TokenSums`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nemo_ee.megatron.loss.linear_cross_entropy import LinearCrossEntropy, buffers_of_a_chunk, linear_cross_entropy
from nemo_ee.megatron.loss.teacher import FullTeacher, Teacher
from nemo_ee.megatron.loss.vocab_parallel import chunk_bytes_on, tokens_of_a_chunk
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


def exits_in_turn(
    context: StageContext, batch: MicroBatch, output: StageOutput, teacher: Teacher | None
) -> Iterator[tuple[ExitHead, MicroBatch, StageOutput, Teacher | None]]:
    """The arguments of `tune_exit` for every exit of a stage, so that a full teacher is formed once for all of them.

    The exits that learn from it run side by side, a piece of the sequence at a time: each comes once for every piece,
    and its sums are to be added up. A piece is as long as a chunk of the loss, in whole positions. On their own, on
    the whole microbatch, run all other exits; `layer` exits, which attend over the sequence; and, under mixed
    precision with fp32 parameters, all exits: of several with output weights of their own only the last cast is kept
    (`WeightCasts`), so each piece would cast them again. How an exit runs does not depend on the others.

    Every rank of the tensor-parallel group must iterate to the end.

    Args:
        context: the stage.
        batch: the microbatch, tokens [b, s].
        output: output of the stage's layers for it, taps [s, b, h] ([s/tp, b, h] under sequence parallelism).
        teacher: the final exit's distributions for it, or None.

    Yields:
        (exit, microbatch, output, teacher) of a piece or of the whole.
    """
    side_by_side, config = [], context.model.config
    castless = context.autocast in (None, config.params_dtype)
    for head in context.model.exits:
        learns = castless and isinstance(teacher, FullTeacher) and context.objectives[head.exit.name].has_teacher
        if learns and head.exit.architecture != "layer":
            side_by_side.append(head)
        else:
            yield head, batch, output, teacher
    if not side_by_side:
        return
    vocabulary = context.model.vocabulary()
    objective = context.objectives[side_by_side[0].exit.name]  # the buffers are those of every one
    rows, buffers = teacher.weight.shape[0], buffers_of_a_chunk(objective, teacher, config.params_dtype)
    chunk_bytes = context.chunk_bytes or chunk_bytes_on(context.device, rows, buffers=buffers)
    tokens = tokens_of_a_chunk(rows, chunk_bytes, buffers=buffers)
    length, ranks = batch.tokens.shape[1], config.tensor_model_parallel_size if config.sequence_parallel else 1
    # Under sequence parallelism a piece is made of a piece of every rank's part of the sequence.
    positions = torch.arange(length, device=context.device).view(ranks, -1)
    flat = torch.arange(batch.tokens.numel(), device=context.device).view(length, -1)
    size = max(1, tokens // (ranks * flat.shape[1]))
    for start in range(0, positions.shape[1], size):
        own = slice(start, start + size)
        chosen = positions[:, own].flatten()
        formed = teacher.formed(flat[chosen].flatten(), vocabulary)
        piece = batch.at(chosen)
        part = replace(output, taps={stop: tap[own] for stop, tap in output.taps.items()})
        for head in side_by_side:
            yield head, piece, part, formed
        del formed  # before the next one is formed


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
        casts=context.casts,
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
        casts=context.casts,
        chunk_bytes=context.chunk_bytes,
    )
