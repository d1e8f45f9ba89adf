# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-wrap hooks around the one with which `AutoBridge` loads a backbone.

    mark_as_empty      every parameter becomes NaN
    AutoBridge         loads the parameters for which it has a mapping
    fill_the_rest      reads those that are still NaN from the same directory, then loads or initialises the exits

A mapping may lack a parameter without an error: Megatron-Bridge 0.6 logs a warning. Mappings of most families name
Transformer Engine's norms only, and none has the copy of the output weight that a stage's exits project with.
"""

from __future__ import annotations

import logging

import torch

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.module_weights import load_exits, load_shards
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import local_shards

logger = logging.getLogger(__name__)


@torch.no_grad()
def mark_as_empty(models: list[EarlyExitGPTModel]) -> list[EarlyExitGPTModel]:
    """Set the backbone's parameters to NaN."""
    for model in models:
        for _, parameter in model.backbone_named_parameters():
            parameter.fill_(float("nan"))
    return models


def fill_the_rest(
    models: list[EarlyExitGPTModel], backbone: WeightSource, exits: WeightSource | None, *, seed: int
) -> list[EarlyExitGPTModel]:
    """Load the backbone's parameters that are NaN, and all exits. Every rank fills its own shards.

    Args:
        models: one stage.
        backbone: weights of the directory that `AutoBridge` loaded.
        exits: tuned exits, keys `<exit name>.<parameter>`, or None. Other exits are initialised by their `init`.
        seed: seed of random initialisation.

    Raises:
        ValueError: model and weights do not belong together.
    """
    (model,) = models
    wanted = model.backbone_sharded_state_dict()
    empty = {key: shard for key, shard in wanted.items() if _is_empty({key: shard})}
    if empty:
        logger.info("AutoBridge has no mapping for %d tensors of this stage; nemo_ee reads them", len(empty))
        load_shards(empty, backbone)
    load_exits(model, backbone, exits, seed=seed)
    return models


def _is_empty(sharded: dict) -> bool:
    return any(bool(shard.data.isnan().any()) for shard in local_shards(sharded))
