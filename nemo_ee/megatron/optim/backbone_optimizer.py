# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The trained backbone's entry among the optimizers: one part on every pipeline stage, one name, `backbone`.

It is clipped by one norm over tensor and pipeline parallelism, so every stage joins that one collective in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from nemo_ee.megatron.model.backbone_training import backbone_parameters
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizer, optimizer_options, parameter_groups

BACKBONE = "backbone"


class BackboneOptimizer(ExitOptimizer):
    """This stage's part of the backbone's optimizer."""

    def holders(self) -> ProcessGroup:
        """The ranks that hold a part of the backbone: tensor times pipeline parallelism."""
        return parallel_state.get_model_parallel_group()

    def rank_of_scalars(self) -> tuple[int, ...]:
        """Replica id of what is stored once; only the first stage's counts."""
        return (parallel_state.get_pipeline_model_parallel_rank(), *super().rank_of_scalars()[1:])


def build_backbone_optimizer(
    model: EarlyExitGPTModel, optim: Mapping[str, Any], *, make: Callable[..., torch.optim.Optimizer]
) -> BackboneOptimizer:
    """The optimizer of all that trains in this stage's backbone; lr, min_lr and weight_decay are `model.optim`'s.

    Args:
        model: a stage whose backbone trains.
        optim: `model.optim`.
        make: the optimizer's class or factory.
    """
    parameters = backbone_parameters(model)
    groups = parameter_groups(
        BACKBONE,
        parameters.values(),
        lr=optim["lr"],
        min_lr=(optim.get("sched") or {}).get("min_lr") or 0.0,
        weight_decay=optim.get("weight_decay") or 0.0,
    )
    return BackboneOptimizer(BACKBONE, parameters, make(groups, **optimizer_options(optim)))
