# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The optimizers of everything that trains on one pipeline stage, by `model.optim` and `model.megatron_amp_O2`.

A trained backbone is one more entry beside the exits, with one name on every stage, `backbone`. It is clipped by one
norm over tensor and pipeline parallelism, so every stage joins that one collective in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from nemo_ee.megatron.model.backbone_training import backbone_parameters
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.optim.distributed_exit_optimizer import MegatronExitOptimizer
from nemo_ee.megatron.optim.exit_optimizers import (
    ExitOptimizer,
    ExitOptimizers,
    exit_parameter_groups,
    optimizer_options,
    parameter_groups,
)
from nemo_ee.megatron.versions import distributed_adam

BACKBONE = "backbone"
_DISTRIBUTED = "mcore_distributed_optim"


def optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer behind `model.optim.name`: (parameter groups, **options) -> optimizer.

    torch's own run as one kernel over all parameters (`fused`). The distributed optimizer's is the one that
    Megatron-core picks: Transformer Engine's, else Apex's, else torch's AdamW.

    Args:
        name: adam | adamw | fused_adam (Apex's) | mcore_distributed_optim.
    """
    if name == "fused_adam":
        from apex.optimizers import FusedAdam

        return FusedAdam
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    factory = distributed_adam() if name == _DISTRIBUTED else plain[name]
    return partial(factory, fused=True) if factory in plain.values() else factory


def stage_optimizers(
    model: EarlyExitGPTModel,
    optim: Mapping[str, Any],
    *,
    main_weights: bool = False,
    max_norm: float = 0.0,
    trains_backbone: bool = False,
) -> ExitOptimizers:
    """The optimizers of a stage's exits and of the trained part of its backbone.

    Every rank must call it once the weights are on their device.

    Args:
        model: this stage.
        optim: `model.optim`.
        main_weights: `model.megatron_amp_O2`: the parameters are bf16, step fp32 copies of them.
        max_norm: gradient clipping per exit, 0 for none.
        trains_backbone: the backbone, or low-rank updates of it, trains too; in fp32 and with plain optimizers only.
    """
    make, sharded = optimizer_factory(optim["name"]), optim["name"] == _DISTRIBUTED
    wrap = partial(MegatronExitOptimizer, sharded=sharded) if sharded or main_weights else None
    assert wrap is None or not trains_backbone, "the backbone's optimizer is a plain one"
    more = [build_backbone_optimizer(model, optim, make=make)] if trains_backbone else []
    return build_exit_optimizers(model.exits, optim, make=make, max_norm=max_norm, wrap=wrap, more=more)


def build_exit_optimizers(
    heads: Iterable[ExitHead],
    optim: Mapping[str, Any],
    *,
    make: Callable[..., torch.optim.Optimizer],
    max_norm: float,
    more: Iterable[ExitOptimizer] = (),
    wrap: Callable[[ExitHead, dict[str, Parameter], torch.optim.Optimizer], ExitOptimizer] | None = None,
) -> ExitOptimizers:
    """One optimizer per exit that has something to train.

    Args:
        heads: this stage's exits.
        optim: `model.optim`; betas, eps, lr and weight_decay reach the optimizer.
        make: the optimizer's class or factory.
        max_norm: gradient clipping per exit, 0 for none.
        more: further entries, stepped after the exits.
        wrap: makes the exit's optimizer of (exit, its parameters by key, torch optimizer); default `ExitOptimizer`.
    """
    exits = []
    for head in heads:
        shards = head.sharded_state_dict(f"exits.{head.exit.name}.")
        keys = {id(shard.data): key for key, shard in shards.items() if isinstance(shard.data, Tensor)}
        groups = exit_parameter_groups(head, optim)
        parameters = {keys[id(parameter)]: parameter for group in groups for parameter in group["params"]}
        if parameters:
            optimizer = make(groups, **optimizer_options(optim))
            exits.append(
                wrap(head, parameters, optimizer) if wrap else ExitOptimizer(head.exit.name, parameters, optimizer)
            )
    return ExitOptimizers([*exits, *more], max_norm=max_norm)


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
