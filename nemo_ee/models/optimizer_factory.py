# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which optimizer `model.optim.name` and `model.megatron_amp_O2` ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import Adam as MegatronAdam
from nemo.core.optim import get_optimizer

from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.optim.backbone_optimizer import build_backbone_optimizer
from nemo_ee.megatron.optim.distributed_exit_optimizer import MegatronExitOptimizer
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers, build_exit_optimizers

DISTRIBUTED = "mcore_distributed_optim"
_TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The torch optimizer behind a name: (parameter groups, **options) -> optimizer.

    torch's own run as one kernel over all parameters (`fused`). The distributed optimizer's is the one that
    Megatron-core picks: Transformer Engine's, else Apex's, else torch's AdamW.
    """
    factory = MegatronAdam if name == DISTRIBUTED else _TORCH.get(name)
    if factory is None:
        return get_optimizer(name)
    return partial(factory, fused=True) if factory in _TORCH.values() else factory


def exit_optimizers_for(
    heads: Iterable[ExitHead],
    optim: Mapping[str, Any],
    *,
    main_weights: bool,
    max_norm: float,
    backbone: EarlyExitGPTModel | None = None,
) -> ExitOptimizers:
    """The optimizers of a stage's exits. Every rank must call it once the weights are on their device.

    Args:
        heads: this stage's exits.
        optim: `model.optim`.
        main_weights: `model.megatron_amp_O2`: the parameters are bf16, step fp32 copies of them.
        max_norm: gradient clipping per exit, 0 for none.
        backbone: this stage, if its backbone (or low-rank updates of it) trains too; of fp32 parameters and with
            plain optimizers only.
    """
    make = optimizer_factory(optim["name"])
    sharded = optim["name"] == DISTRIBUTED
    wrap = partial(MegatronExitOptimizer, sharded=sharded) if sharded or main_weights else None
    assert wrap is None or backbone is None, "the backbone's optimizer is a plain one"
    more = [] if backbone is None else [build_backbone_optimizer(backbone, optim, make=make)]
    return build_exit_optimizers(heads, optim, make=make, max_norm=max_norm, wrap=wrap, more=more)
