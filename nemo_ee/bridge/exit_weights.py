# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The pre-wrap hook that fills a stage: the one of `AutoBridge`, and what it leaves out.

    1. every parameter of the backbone becomes NaN
    2. AutoBridge loads what it has a mapping for; modules that it has none for are hidden from it
    3. parameters that are still NaN are read from the same directory
    4. the exits are loaded, or initialised from the same directory

Megatron-Bridge 0.6.2 ends with an AttributeError where a parameter has no mapping
(models/conversion/model_bridge.py:1100: the task is None), and logs a warning where a mapping names a tensor that the
directory lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.module_weights import load_exits, load_shards
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import local_shards

logger = logging.getLogger(__name__)

Hook = Callable[[list[Any]], Any]

# Modules that AutoBridge does not load. It has names of Megatron's own norms for Llama alone, and none for the copy of
# the output weight that the exits of a stage project with.
_WITHOUT_MAPPING = ("exits", "backbone_output", "input_layernorm", "pre_mlp_layernorm")


def fill_stage(
    models: list[EarlyExitGPTModel],
    *,
    auto_bridge: Iterable[Hook],
    backbone: WeightSource,
    exits: WeightSource | None,
    seed: int,
) -> list[EarlyExitGPTModel]:
    """Fill a new stage. Every rank must call it.

    Args:
        models: the stage, alone.
        auto_bridge: the hooks of AutoBridge's provider.
        backbone: weights of the directory that they load.
        exits: tuned exits, keys `<exit name>.<parameter>`, or None. Other exits are initialised by their `init`.
        seed: seed of random initialisation.

    Raises:
        ValueError: model and weights do not belong together.
    """
    (model,) = models
    with torch.no_grad():
        for _, parameter in model.backbone_named_parameters():
            parameter.fill_(float("nan"))
    with _hidden(model):
        for hook in auto_bridge:
            hook(models)
    wanted = model.backbone_sharded_state_dict()
    empty = {key: shard for key, shard in wanted.items() if _is_empty({key: shard})}
    if empty:
        logger.info("%d tensors of this stage are read by nemo_ee, the others by AutoBridge", len(empty))
        load_shards(empty, backbone)
    load_exits(model, backbone, exits, seed=seed)
    return models


@contextmanager
def _hidden(model: EarlyExitGPTModel) -> Iterator[None]:
    """Leave modules without a mapping out of the model."""
    hidden = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if name in _WITHOUT_MAPPING
    ]
    for module, name, _ in hidden:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, child in hidden:
            setattr(module, name, child)


def _is_empty(sharded: dict) -> bool:
    return any(bool(shard.data.isnan().any()) for shard in local_shards(sharded))
