# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One global batch on one stage: tuning with a loss and a backward pass per exit, or evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums, empty_row, row_of
from nemo_ee.megatron.loss.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers
from nemo_ee.megatron.pipeline.exit_loss import evaluate_exit, exits_in_turn, tune_exit
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.stage_forward import stage_outputs

# (stage, exit, microbatch, output of the stage's layers) -> the microbatch with the loss mask of this exit.
Weigh = Callable[[StageContext, ExitHead, MicroBatch, StageOutput], MicroBatch]


def tune_global_batch(
    context: StageContext,
    batches: Sequence[MicroBatch],
    *,
    optimizers: ExitOptimizers,
    sums: ExitSums,
    loss_weights: Mapping[str, float],
    weigh: Weigh | None = None,
) -> Tensor:
    """Fill the gradients of this stage's exits with those of the mean loss per token over the global batch.

    Where tokens are weighted, the mean is over the weights. Every rank of the pipeline must call it.

    Args:
        context: this stage.
        batches: this rank's microbatches.
        optimizers: this stage's exits' optimizers; their gradients are reduced over data parallelism here.
        sums: training sums, added to.
        loss_weights: exit name -> weight of its loss in this step.
        weigh: weighs the tokens by what the exit makes of them now; None: the loss mask stays. Not with a full
            teacher, for which an exit runs piece by piece.

    Returns:
        fp32 scalar, sum of this stage's losses per token (0 on a stage without exits); no gradient.
    """
    nominal = largest_token_count(batches)
    counted = {head.exit.name: empty_row(context.device) for head in context.model.exits}
    with context.casts:
        for batch, output, teacher in stage_outputs(context, batches):
            for head, *work, formed in exits_in_turn(context, batch, output, teacher):
                name = head.exit.name
                scale, taught = loss_weights[name] / nominal, context.objectives[name].has_teacher
                if weigh is not None:
                    work[0] = weigh(context, head, *work)
                loss = tune_exit(context, head, *work, grad_scale=scale, teacher=formed)
                counted[name] += row_of(loss.sums, taught=taught)
                del loss, work, formed  # the gradients of its inputs, and the teacher before the next one is formed
            del output, teacher  # their memory serves the next microbatch
    return finish_gradients(optimizers, counted, nominal=nominal, sums=sums)


def largest_token_count(batches: Sequence[MicroBatch]) -> float:
    """Positions of a global batch on this rank, at least 1: the most that its loss masks can sum to.

    The sum of its tokens' weights, which may exceed it with `weigh` alone, is known only after the batch. Until then
    gradients are scaled by this number.
    """
    return float(sum(batch.labels.numel() for batch in batches)) or 1.0


def finish_gradients(
    optimizers: ExitOptimizers, counted: Mapping[str, Tensor], *, nominal: float, sums: ExitSums
) -> Tensor:
    """Reduce every entry's gradients and numbers over data parallelism, make them means per token, keep the numbers.

    Args:
        optimizers: this stage's.
        counted: name -> row (see `exit_metrics`) of this rank, in the same order on all data-parallel ranks.
        nominal: the factor 1/nominal that the gradients already carry.
        sums: training sums, added to.

    Returns:
        fp32 scalar, sum of the losses per token.
    """
    reduced = {exit.name for exit in optimizers.exits}
    for exit in optimizers.exits:
        exit.reduce_gradients(counted[exit.name], nominal=nominal)
    total = torch.zeros((), device=sums.sums.device)
    for name, values in counted.items():
        if name not in reduced:  # an exit with nothing to train: only its numbers
            torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
    for name, row in counted.items():
        if name in sums.rows:
            sums.add_row(name, row)
            total += sums.mean_loss(row)
    return total


@torch.no_grad()
def evaluate_global_batch(
    context: StageContext, batches: Sequence[MicroBatch], *, sums: ExitSums, agreement: bool
) -> None:
    """Add a global batch's losses to `sums`. Every rank of the pipeline must call it.

    With teachers in the context, the divergence of exits that learn from the final exit is measured too.

    Args:
        context: this stage.
        batches: this rank's microbatches.
        sums: validation sums; not reduced here.
        agreement: also measure the final exit and how often the exits' most likely tokens are its own; the final
            exit's tokens are broadcast over the pipeline once per microbatch. Needs a full-depth model.
    """
    model, with_teachers = context.model, context.teachers is not None
    chosen: list[dict[str, Tensor]] = []  # per microbatch: exit name -> its most likely tokens
    with context.casts:
        for batch, output, teacher in stage_outputs(context, batches):
            results = {
                head.exit.name: evaluate_exit(context, head, batch, output, want_argmax=agreement, teacher=teacher)
                for head in model.exits
            }
            for name, result in results.items():
                taught = with_teachers and context.objectives[name].has_teacher
                sums.add_row(name, row_of(result.sums, taught=taught, entropy=True))
            if agreement and model.post_process:
                results[FULL_MODEL] = _evaluate_final_exit(context, batch, output)
                sums.add_row(FULL_MODEL, row_of(results[FULL_MODEL].sums))
            chosen.append({name: result.argmax for name, result in results.items()})
            del output, teacher  # their memory serves the next microbatch
    context.transport.drain()
    if agreement:
        for batch, tokens in zip(batches, chosen, strict=True):
            _add_agreement(context, batch, tokens, sums)


def _evaluate_final_exit(context: StageContext, batch: MicroBatch, output: StageOutput) -> LinearCrossEntropy:
    """Loss and most likely tokens of the backbone's own output, on the last stage."""
    return linear_cross_entropy(
        [context.model.final_hidden(output.hidden)],
        [context.model.backbone_output_weight()],
        *batch.flat_labels(),
        vocabulary=context.model.vocabulary(),
        want_argmax=True,
        dtype=context.autocast,
        casts=context.casts,
        chunk_bytes=context.chunk_bytes,
    )


def _add_agreement(context: StageContext, batch: MicroBatch, chosen: Mapping[str, Tensor], sums: ExitSums) -> None:
    """Compare the exits' tokens, [s * b] by name, with the final exit's, which the last stage broadcasts."""
    final = chosen.get(FULL_MODEL)
    if final is None:
        final = torch.empty(batch.labels.numel(), dtype=torch.long, device=context.device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(final, last, group=parallel_state.get_pipeline_model_parallel_group())
    _, mask = batch.flat_labels()
    counts = mask > 0
    for head in context.model.exits:
        agreed = (chosen[head.exit.name] == final) & counts
        sums.add_agreement(head.exit.name, agreed=agreed.sum(), compared=counts.sum())
