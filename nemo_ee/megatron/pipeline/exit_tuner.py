# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A tuning run's state on one pipeline stage, for hosts that bring no training loop: Megatron-Bridge, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.loss_weights import loss_weights_at
from nemo_ee.exits.objective import Objective
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.exit_metrics import ExitSums
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.optim.learning_rate import ExitLearningRates, LearningRateSchedule
from nemo_ee.megatron.optim.stage_optimizers import stage_optimizers
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.stage_forward import hidden_state_transport
from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel
from nemo_ee.megatron.pipeline.tuning_step import Weigh, evaluate_global_batch, tune_global_batch


class ExitTuner:
    """Model, optimizers and learning rates of a tuning run on one stage. Every rank must build it, after the model.

    Args:
        model: this stage, its weights on their device. Where they are bf16, fp32 copies of them are stepped.
        early_exit: the exits of the whole model.
        placements: all stages.
        optim: name, lr, betas, eps, weight_decay and `sched`, as `model.optim` of the NeMo host.
        num_steps: optimizer steps of the run.
        max_norm: gradient clipping per exit, 0 for none.
        timeout_minutes: a transfer of a teacher that takes longer ends the run.
        chunk_bytes: see `StageContext`.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(
        self,
        model: EarlyExitGPTModel,
        early_exit: EarlyExitConfig,
        placements: Sequence[StagePlacement],
        *,
        optim: Mapping[str, Any],
        num_steps: int,
        max_norm: float = 0.0,
        timeout_minutes: float = 30,
        chunk_bytes: int | None = None,
    ) -> None:
        self.early_exit, self.num_steps, self.step = early_exit, num_steps, 0
        objectives = {name: Objective.of(self.early_exit, name) for name in self.early_exit.names}
        self.context = StageContext(model, hidden_state_transport(), objectives, chunk_bytes=chunk_bytes)
        if self.early_exit.has_teacher:
            timeout = timedelta(minutes=timeout_minutes)
            more = {"autocast": None, "timeout": timeout, "chunk_bytes": chunk_bytes}
            teachers = TeacherChannel(model, self.early_exit, placements, **more)
            self.context = replace(self.context, teachers=teachers)
        in_half = model.config.params_dtype is torch.bfloat16
        self.optimizers = stage_optimizers(model, optim, main_weights=in_half, max_norm=max_norm)
        schedule = LearningRateSchedule.of(optim.get("sched") or {}, num_steps=num_steps)
        self.learning_rates = ExitLearningRates(self.optimizers, schedule, optim)
        self.sums = ExitSums(self.early_exit.names, self.context.device)

    def tune(
        self,
        batches: Sequence[MicroBatch],
        *,
        log: bool = True,
        objective: Objective | None = None,
        weigh: Weigh | None = None,
    ) -> dict[str, dict[str, float]]:
        """One optimizer step. Every rank must call it with the same `log`.

        Args:
            batches: this rank's microbatches of the global batch.
            log: add the numbers of all stages and data-parallel ranks up, which joins the stages.
            objective: of all exits in this step, None for those of the block. One without a teacher spares the step
                the final exit; every rank must give the same.
            weigh: see `tune_global_batch`.

        Returns:
            With `log`: exit name -> {"loss", "lr", "grad_norm", ...} since the last log, else nothing.
        """
        self.optimizers.zero_grad()
        weights = loss_weights_at(self.context.model.placement.exits, step=self.step, num_steps=max(1, self.num_steps))
        context = self.context
        if objective is not None:
            context = replace(context, objectives=dict.fromkeys(context.objectives, objective))
            if not objective.has_teacher:
                context = replace(context, teachers=None)
        run = {"optimizers": self.optimizers, "sums": self.sums, "loss_weights": weights}
        tune_global_batch(context, batches, **run, weigh=weigh)
        result = {}
        if log:
            result = self.sums.reduce(over_data=False, step_values=self.optimizers.step_values(weights))
        self.optimizers.step()
        self.learning_rates.step()
        self.step += 1
        return result

    def evaluate(
        self, global_batches: Iterable[Sequence[MicroBatch]], *, agreement: bool = False
    ) -> dict[str, dict[str, float]]:
        """Every exit's validation loss over some global batches, of which each rank gives its microbatches.

        Args:
            agreement: compare with a full-depth model's final exit too, see `evaluate_global_batch`.
        """
        self.context.drain()
        sums = ExitSums(self.early_exit.names, self.context.device)
        for batches in global_batches:
            evaluate_global_batch(self.context, batches, sums=sums, agreement=agreement)
        return sums.reduce()
