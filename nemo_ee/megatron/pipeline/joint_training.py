# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One global batch of joint training: backbone (or its low-rank updates) and exits on Megatron's own schedules.

    loss = sum over tokens / number of tokens, of the final exit's cross-entropy + sum_e weight_e(step) * exit e's

Takes the place of `tune_global_batch`. The model runs in training mode, dropout as configured, while the schedule
runs, and is in evaluation mode otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums, label_row
from nemo_ee.megatron.model.backbone_training import SharedOutputWeight
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.optim.backbone_optimizer import BACKBONE
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers
from nemo_ee.megatron.pipeline.exit_loss import MicroBatch
from nemo_ee.megatron.pipeline.joint_forward import final_exit_loss, forward_with_exit_losses
from nemo_ee.megatron.pipeline.tuning_step import finish_gradients


class JointTraining:
    """What joint training keeps between steps. Every rank must build it, after the model.

    Args:
        model: this stage.
        placements: all stages.
        seed: of the run; the random numbers of a step follow from it and the step's number.
    """

    def __init__(self, model: EarlyExitGPTModel, placements: Sequence[StagePlacement], *, seed: int) -> None:
        self.model, self.seed = model, seed
        self.output_weight = SharedOutputWeight(model, placements)
        config = model.config
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
        autocast: torch.dtype | None,
    ) -> Tensor:
        """Fill the gradients of all that trains on this stage with those of the objective.

        Every rank must call it with the same number of microbatches.

        Args:
            batches: this rank's microbatches, the same on every stage of its pipeline.
            step: global batches trained so far.
            optimizers: the exits' and the backbone's.
            sums: training sums of exits and full model, added to.
            loss_weights: exit name -> weight of its loss in this step.
            autocast: dtype of mixed precision.

        Returns:
            fp32 scalar, sum of this stage's losses per token; no gradient.
        """
        # The true token count is known only after the batch; until then gradients are scaled by the largest it can be.
        nominal = float(sum(batch.labels.numel() for batch in batches)) or 1.0
        losses: dict[tuple[int, str], Tensor] = {}
        seed_dropout(self.seed, step)
        self.model.train()
        try:
            self._run_schedule(
                batches,
                loss_scales={name: weight / nominal for name, weight in loss_weights.items()},
                # The schedule divides a last stage's loss by the number of microbatches.
                final_scale=len(batches) / nominal,
                losses=losses,
                autocast=autocast,
            )
        finally:
            self.model.eval()
        self.output_weight.sum_gradients()
        counted = self._counted(batches, losses)
        total = finish_gradients(optimizers, counted, nominal=nominal, sums=sums)
        if self.model.post_process:
            sums.add_row(FULL_MODEL, counted[BACKBONE])
            total += sums.mean_loss(counted[BACKBONE])
        return total

    def _run_schedule(
        self,
        batches: Sequence[MicroBatch],
        *,
        loss_scales: Mapping[str, float],
        final_scale: float,
        losses: dict[tuple[int, str], Tensor],
        autocast: torch.dtype | None,
    ) -> None:
        """Forward and backward of all microbatches; `losses` gets every loss sum by (microbatch, name)."""

        def forward_step(
            data: Iterator[tuple[int, MicroBatch]], model: EarlyExitGPTModel
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict]]]:
            index, batch = next(data)

            def record(name: str, loss: Tensor) -> None:
                losses[index, name] = loss

            def loss_func(hidden: Tensor) -> tuple[Tensor, dict]:  # called on the last stage only
                loss = final_exit_loss(model, hidden, batch, autocast=autocast)
                record(FULL_MODEL, loss.detach())
                return loss * final_scale, {}

            hidden = forward_with_exit_losses(model, batch, loss_scales=loss_scales, record=record, autocast=autocast)
            return hidden, loss_func

        micro_batch, sequence = batches[0].tokens.shape
        device = batches[0].tokens.device
        # Megatron's linears restore autocast in their backward on CUDA only; on the CPU it has to run under it.
        in_backward = autocast if device.type == "cpu" else None
        with torch.autocast(device.type, dtype=in_backward or torch.bfloat16, enabled=in_backward is not None):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(enumerate(batches)),
                model=self.model,
                num_microbatches=len(batches),
                seq_length=sequence,
                micro_batch_size=micro_batch,
                forward_only=False,
            )

    def _counted(self, batches: Sequence[MicroBatch], losses: Mapping[tuple[int, str], Tensor]) -> dict[str, Tensor]:
        """Name -> row of this rank; the backbone's loss is the final exit's, 0 except on the last stage."""
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
        rows = {head.exit.name: head.exit.name for head in self.model.exits} | {BACKBONE: FULL_MODEL}
        missing = torch.zeros_like(tokens)
        return {
            name: label_row(sum((losses.get((index, row), missing) for index in range(len(batches))), missing), tokens)
            for name, row in rows.items()
        }


def seed_dropout(seed: int, step: int) -> None:
    """Start the random numbers of a step anew, so that a resumed run draws what an undisturbed one does.

    They differ between pipeline stages and data-parallel ranks. Tensor-parallel ranks share Megatron's default stream,
    for dropout of what they all hold, and have one each for what they hold a part of.
    """
    stage, replica = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    digest = hashlib.blake2b(f"{seed}/{step}/{stage}/{replica}".encode(), digest_size=4).digest()
    own = int.from_bytes(digest, "big") >> 1  # positive as a 32-bit number, what every generator takes
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)
