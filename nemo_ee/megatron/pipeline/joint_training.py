# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One global batch of joint training: backbone (or its low-rank updates) and exits on Megatron's own schedules.

    loss = sum over tokens / number of tokens, of the final exit's cross-entropy + sum_e weight_e(step) * exit e's

It is used in place of `tune_global_batch`. The model is in training mode, dropout as configured, while the schedule
runs, and in evaluation mode otherwise.

The backbone's output weight has copies on several stages: the first one where it is tied to the embeddings, the last
one, and every stage with an exit that shares it. Megatron sums the gradients of the first and the last stage for its
own data-parallel wrapper only. Here one group holds the stages with a copy, and every copy makes the same step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums, label_row
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers
from nemo_ee.megatron.optim.stage_optimizers import BACKBONE
from nemo_ee.megatron.pipeline.joint_forward import final_exit_loss, forward_with_exit_losses
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.transport import new_pipeline_group
from nemo_ee.megatron.pipeline.tuning_step import finish_gradients, largest_token_count


class JointTraining:
    """Joint training's state between steps. Every rank must build it, after the model.

    Args:
        context: this stage.
        placements: all stages.
        seed: seed of the run; the random numbers of a step follow from it and the step's number.
    """

    def __init__(self, context: StageContext, placements: Sequence[StagePlacement], *, seed: int) -> None:
        self.context, self.seed = context, seed
        self.output_weight = SharedOutputWeight(context.model, placements)
        config = context.model.config
        config.enable_autocast = False  # done in the forward step, on the CPU too
        config.pipeline_dtype = config.params_dtype  # under autocast the residual stream stays in it

    def train_global_batch(
        self,
        batches: Sequence[MicroBatch],
        *,
        step: int,
        optimizers: ExitOptimizers,
        sums: ExitSums,
        loss_weights: Mapping[str, float],
    ) -> Tensor:
        """Fill the gradients of all that trains on this stage with those of the objective.

        Every rank must call it with the same number of microbatches.

        Args:
            batches: this rank's microbatches, the same on every stage of its pipeline.
            step: global batches trained so far.
            optimizers: the exits' and the backbone's.
            sums: training sums of exits and full model, added to.
            loss_weights: exit name -> weight of its loss in this step.

        Returns:
            fp32 scalar, sum of this stage's losses per token; no gradient.
        """
        model, nominal = self.context.model, largest_token_count(batches)
        seed_dropout(self.seed, step)
        model.train()
        try:
            losses = self._run_schedule(
                batches,
                loss_scales={name: weight / nominal for name, weight in loss_weights.items()},
                # The schedule divides a last stage's loss by the number of microbatches.
                final_scale=len(batches) / nominal,
            )
        finally:
            model.eval()
        self.output_weight.sum_gradients()
        counted = self._counted(batches, losses)
        total = finish_gradients(optimizers, counted, nominal=nominal, sums=sums)
        if model.post_process:
            sums.add_row(FULL_MODEL, counted[BACKBONE])
            total += sums.mean_loss(counted[BACKBONE])
        return total

    def _run_schedule(
        self, batches: Sequence[MicroBatch], *, loss_scales: Mapping[str, float], final_scale: float
    ) -> list[dict[str, Tensor]]:
        """Forward and backward of all microbatches. Returns each one's loss sums by name."""
        context = self.context
        losses: list[dict[str, Tensor]] = [{} for _ in batches]

        def final_loss(hidden: Tensor, *, batch: MicroBatch, own: dict[str, Tensor]) -> tuple[Tensor, dict]:
            loss = final_exit_loss(context, hidden, batch)
            own[FULL_MODEL] = loss.detach()
            return loss * final_scale, {}

        def forward_step(data: Iterator[tuple[MicroBatch, dict[str, Tensor]]], _: EarlyExitGPTModel) -> tuple:
            batch, own = next(data)
            hidden = forward_with_exit_losses(context, batch, loss_scales=loss_scales, losses=own)
            return hidden, partial(final_loss, batch=batch, own=own)  # called on the last stage only

        micro_batch, sequence = batches[0].tokens.shape
        with context.mixed_precision(backward=True):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=zip(batches, losses, strict=True),
                model=context.model,
                num_microbatches=len(batches),
                seq_length=sequence,
                micro_batch_size=micro_batch,
                forward_only=False,
            )
        return losses

    def _counted(self, batches: Sequence[MicroBatch], losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Name -> row of this rank; the backbone's loss is the final exit's, 0 except on the last stage."""
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
        rows = {head.exit.name: head.exit.name for head in self.context.model.exits} | {BACKBONE: FULL_MODEL}
        missing = torch.zeros_like(tokens)
        return {
            name: label_row(sum((own.get(row, missing) for own in losses), missing), tokens)
            for name, row in rows.items()
        }


class SharedOutputWeight:
    """The copies of a trained output weight on the stages of one pipeline. Every rank must build it.

    Args:
        model: this stage.
        placements: all stages.
    """

    def __init__(self, model: EarlyExitGPTModel, placements: Sequence[StagePlacement]) -> None:
        last = len(placements) - 1
        stages = {p.stage for p in placements if any(exit.output != "own" for exit in p.exits)} | {last}
        if model.share_embeddings_and_output_weights:
            stages.add(0)
        self._weight: Parameter | None = None
        self._group: ProcessGroup | None = None
        if len(stages) == 1:
            return
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        group = pipeline if len(stages) == pipeline.size() else new_pipeline_group(sorted(stages))
        if model.placement.stage in stages:
            self._group, self._weight = group, model.backbone_output_weight()
            self._weight.shared = model.placement.stage != min(stages)  # Megatron's mark: counted once in norms

    def sum_gradients(self) -> None:
        """Every copy gets the sum of all copies' gradients. Every rank calls it once a step, after the backward
        passes."""
        if self._weight is not None and self._weight.requires_grad:
            torch.distributed.all_reduce(self._weight.grad, group=self._group)


def seed_dropout(seed: int, step: int) -> None:
    """Start the random numbers of a step anew, so that a resumed run draws what an undisturbed one does.

    They differ between pipeline stages and data-parallel ranks. Tensor-parallel ranks share Megatron's default stream,
    for dropout of what they all hold, and have one each for what they hold a part of.
    """
    stage, replica = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    digest = hashlib.blake2b(f"{seed}/{step}/{stage}/{replica}".encode(), digest_size=4).digest()
    own = int.from_bytes(digest, "big") >> 1  # positive as a 32-bit number, which every generator accepts
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)
