# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fill one stage from checkpoints: backbone, low-rank updates of it, exits, and those exits that start anew."""

from __future__ import annotations

from omegaconf import DictConfig

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.low_rank_weights import load_low_rank
from nemo_ee.checkpoint.module_weights import load_shards
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import initialise_exit_head


def fill_stage(
    model: EarlyExitGPTModel,
    cfg: DictConfig,
    *,
    backbone: WeightSource,
    exits: WeightSource | None,
    updates: WeightSource | None,
    low_rank: bool,
) -> None:
    """Fill a stage's parameters in place.

    Args:
        model: the stage.
        cfg: the model config.
        backbone: the backbone's tensors under canonical keys.
        exits: tuned exits, keys `<exit name>.<parameter>`; exits that it does not hold start as their `init` says.
        updates: stored low-rank updates of the backbone; None starts new ones.
        low_rank: the stage's layers have low-rank updates.

    Raises:
        ValueError: model and weights do not belong together.
    """
    seed = cfg.get("seed", 1234)
    load_shards(model.backbone_sharded_state_dict(), backbone)
    if low_rank:
        load_low_rank(model, updates, seed=seed)
    stored = {key.split(".", 1)[0] for key in exits.keys()} if exits is not None else set()
    for head in model.exits:
        if head.exit.name in stored:
            load_shards(head.sharded_state_dict(f"{head.exit.name}."), exits)
            continue
        initialise_exit_head(
            head,
            lambda key, offset, shape: backbone.read(key, offset, shape, allow_missing_rows=True),
            num_layers=cfg.num_layers,
            vocab_size=model.true_vocab_size,
            tied=cfg.get("share_embeddings_and_output_weights", True),
            std=cfg.get("init_method_std", 0.02),
            seed=seed,
        )
