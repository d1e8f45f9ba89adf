# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One tuning step of one stage: microbatches through the schedule, a loss and a backward pass per exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.exits.objective import Objective
from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums, empty_row, row_of
from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.teacher import Teacher
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel, StageOutput
from nemo_ee.megatron.model.low_rank import spread_over_tensor_parallel
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers
from nemo_ee.megatron.pipeline.exit_loss import MicroBatch, evaluate_exit, tune_exit
from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel
from nemo_ee.megatron.pipeline.transport import StageLink, run_stage


def tune_global_batch(
    model: EarlyExitGPTModel,
    batches: Sequence[MicroBatch],
    *,
    optimizers: ExitOptimizers,
    sums: ExitSums,
    link: StageLink,
    loss_weights: Mapping[str, float],
    objectives: Mapping[str, Objective],
    channel: TeacherChannel | None,
    autocast: torch.dtype | None,
) -> Tensor:
    """Fill the gradients of this stage's exits with those of the mean loss per token over the global batch.

    Where tokens are weighted, the mean is over the weights.

    Args:
        model: this stage.
        batches: this rank's microbatches.
        optimizers: this stage's exits' optimizers; their gradients are reduced over data parallelism here.
        sums: training sums, added to.
        link: pipeline ends.
        loss_weights: exit name -> weight of its loss in this step.
        objectives: exit name -> what its loss is made of.
        channel: where teachers come from; None if no exit of the model has one.
        autocast: dtype of mixed precision.

    Returns:
        fp32 scalar, sum of this stage's losses per token (0 on a stage without exits); no gradient.
    """
    vocabulary = model.vocabulary()
    # The true sum of weights is known only after the batch; until then gradients are scaled by the most it can be.
    nominal = float(sum(batch.labels.numel() for batch in batches)) or 1.0
    device = batches[0].tokens.device
    counted = {head.exit.name: empty_row(device) for head in model.exits}

    def work(index: int, stage: StageOutput, teacher: Teacher | None) -> None:
        for head in model.exits:
            objective = objectives[head.exit.name]
            taught = teacher if objective.has_teacher else None
            result = tune_exit(
                head,
                stage.taps[head.exit.stop],
                batches[index],
                rotary_pos_emb=stage.rotary_pos_emb,
                vocabulary=vocabulary,
                grad_scale=loss_weights[head.exit.name] / nominal,
                objective=objective,
                teacher=taught,
                autocast=autocast,
            )
            counted[head.exit.name] += row_of(result.sums, taught=taught is not None)

    run_microbatches(model, batches, link=link, channel=channel, work=work, autocast=autocast)
    return finish_gradients(optimizers, counted, nominal=nominal, sums=sums)


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
    model: EarlyExitGPTModel,
    batches: Sequence[MicroBatch],
    *,
    sums: ExitSums,
    link: StageLink,
    agreement: bool,
    objectives: Mapping[str, Objective],
    channel: TeacherChannel | None,
    autocast: torch.dtype | None,
) -> None:
    """Add a global batch's losses to `sums`; every rank of the pipeline must call it.

    Args:
        model: this stage.
        batches: this rank's microbatches.
        sums: validation sums; not reduced here.
        link: pipeline ends.
        agreement: also measure the final exit and how often the exits' most likely tokens are its own; the final
            exit's tokens are broadcast over the pipeline once per microbatch. Needs a full-depth model.
        objectives: exit name -> objective; the divergence from its teacher is measured, its loss is not.
        channel: where teachers come from; None measures no divergence.
        autocast: dtype of mixed precision.
    """
    vocabulary = model.vocabulary()
    device = batches[0].tokens.device
    chosen: dict[tuple[int, str], Tensor] = {}

    def work(index: int, stage: StageOutput, teacher: Teacher | None) -> None:
        for head in model.exits:
            objective = objectives[head.exit.name]
            taught = teacher if objective.has_teacher else None
            result = evaluate_exit(
                head,
                stage.taps[head.exit.stop],
                batches[index],
                rotary_pos_emb=stage.rotary_pos_emb,
                vocabulary=vocabulary,
                want_argmax=agreement,
                objective=replace(objective, label_weight=1.0, teacher_weight=0.0, by_confidence=False),
                teacher=taught,
                autocast=autocast,
            )
            sums.add_row(head.exit.name, row_of(result.sums, taught=taught is not None, entropy=True))
            if agreement:
                chosen[index, head.exit.name] = result.argmax
        if agreement and model.post_process:
            chosen[index, FULL_MODEL] = _final_exit(model, stage, batches[index], sums, autocast)

    run_microbatches(model, batches, link=link, channel=channel, work=work, autocast=autocast)
    link.drain()
    if not agreement:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    for index, batch in enumerate(batches):
        final = chosen.get((index, FULL_MODEL))
        if final is None:
            final = torch.empty(batch.labels.numel(), dtype=torch.long, device=device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(final, last, group=parallel_state.get_pipeline_model_parallel_group())
        _, mask = batch.flat_labels()
        counts = mask > 0
        for head in model.exits:
            agreed = (chosen[index, head.exit.name] == final) & counts
            sums.add_agreement(head.exit.name, agreed=agreed.sum(), compared=counts.sum())


def _final_exit(
    model: EarlyExitGPTModel, stage: StageOutput, batch: MicroBatch, sums: ExitSums, autocast: torch.dtype | None
) -> Tensor:
    """Loss of the backbone's own output on the last stage; returns its most likely tokens, [s * b]."""
    hidden = spread_over_tensor_parallel(stage.hidden, model.config).flatten(0, 1)
    labels, mask = batch.flat_labels()
    result = linear_cross_entropy(
        [hidden],
        [model.backbone_output_weight()],
        labels,
        mask,
        vocabulary=model.vocabulary(),
        want_argmax=True,
        dtype=autocast,
    )
    sums.add_row(FULL_MODEL, row_of(result.sums))
    return result.argmax


def run_microbatches(
    model: EarlyExitGPTModel,
    batches: Sequence[MicroBatch],
    *,
    link: StageLink,
    work: Callable[[int, StageOutput, Teacher | None], None],
    autocast: torch.dtype | None,
    channel: TeacherChannel | None = None,
) -> None:
    """Run this stage's layers over the microbatches; `work` gets each one's taps after its state was sent on.

    With a channel it also gets the microbatch's teacher, and runs later by as many microbatches as that takes.
    """
    micro_batch, sequence = batches[0].tokens.shape
    config, device = model.config, batches[0].tokens.device
    if config.sequence_parallel:
        sequence //= parallel_state.get_tensor_model_parallel_world_size()
    # Under autocast the residual stream stays in the parameters' dtype, so that is what travels between stages.
    dtype = config.params_dtype
    held: dict[int, tuple[StageOutput, Callable[[], Teacher] | None]] = {}

    def forward(index: int, received: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            stage = model.forward_to_taps(batches[index], received)
        teacher = channel.after_forward(stage, batches[index]) if channel is not None else None
        held[index] = (stage if model.post_process else replace(stage, hidden=None), teacher)
        return stage.hidden.to(dtype)

    def after_sending(index: int) -> None:
        stage, teacher = held.pop(index)
        work(index, stage, None if teacher is None else teacher())

    run_stage(
        link,
        num_microbatches=len(batches),
        shape=(sequence, micro_batch, config.hidden_size),
        dtype=dtype,
        device=device,
        forward=forward,
        work=after_sending,
        delay=0 if channel is None else channel.delay,
    )
