# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""This rank's ends in the pipeline, made from Megatron's parallel state."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from megatron.core import parallel_state

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel, new_pipeline_group
from nemo_ee.megatron.pipeline.transport import StageLink


def stage_link() -> StageLink:
    """Where hidden states come from and go to."""
    size = parallel_state.get_pipeline_model_parallel_world_size()
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return StageLink(
        parallel_state.get_pipeline_model_parallel_group() if size > 1 else None,
        None if first else parallel_state.get_pipeline_model_parallel_prev_rank(),
        None if last else parallel_state.get_pipeline_model_parallel_next_rank(),
    )


def teacher_channel(
    model: EarlyExitGPTModel,
    early_exit: EarlyExitConfig,
    placements: Sequence[StagePlacement],
    *,
    autocast: torch.dtype | None,
    timeout_minutes: int,
) -> TeacherChannel | None:
    """The way back of the final exit's distributions; None if no exit learns from it. Every rank must call it."""
    if not early_exit.has_teacher:
        return None
    return TeacherChannel(
        model,
        temperature=early_exit.distillation.temperature,
        top_k=early_exit.distillation.top_k,
        listening=[learns_from_final_exit(early_exit, placement) for placement in placements],
        group=new_pipeline_group(timedelta(minutes=timeout_minutes)) if len(placements) > 1 else None,
        autocast=autocast,
    )


def learns_from_final_exit(early_exit: EarlyExitConfig, placement: StagePlacement) -> bool:
    """Whether some exit of a stage has the final exit as its teacher."""
    return any(early_exit.objective_of(exit.name) != "cross_entropy" for exit in placement.exits)


def keeps_output_weight(early_exit: EarlyExitConfig, placement: StagePlacement) -> bool:
    """Whether a stage forms the final exit's whole distribution from its hidden state."""
    return early_exit.distillation.top_k is None and learns_from_final_exit(early_exit, placement)
