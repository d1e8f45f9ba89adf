# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The part of a backbone that trains on one pipeline stage: everything (`joint`) or low-rank updates of its linears
(`lora`), and the part of it that goes into training checkpoints and files.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch.nn import Parameter

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.megatron.loss.vocab_parallel import output_weight_key
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import global_chunk, local_shards, seeded_normal
from nemo_ee.megatron.model.low_rank import LowRankLinear, add_low_rank_updates
from nemo_ee.megatron.versions import sharding_metadata

BACKBONE_PREFIX = "backbone."  # prefix of the trained backbone's keys in training checkpoints
_LOW_RANK = ("low_rank_a", "low_rank_b")


def prepare_backbone(model: EarlyExitGPTModel, early_exit: EarlyExitConfig) -> None:
    """Make the configured part of the backbone trainable: nothing, everything, or low-rank updates (added here).

    Args:
        model: a fresh stage; with `lora` its layers are built on the local spec.
        early_exit: `train` and `lora.rank` are read.
    """
    if early_exit.train == "lora":
        add_low_rank_updates(model.decoder, rank=early_exit.lora.rank, config=model.config)
    for name, parameter in model.backbone_named_parameters():
        if ".q_layernorm." in name or ".k_layernorm." in name:
            # Replicated, but each rank applies it to its own heads: gradients are summed over tensor parallelism.
            parameter.sees_part_of_heads = True
        parameter.requires_grad_(early_exit.train == "joint" or name.endswith(_LOW_RANK))
    model.trains_backbone = early_exit.train == "joint"


def backbone_parameters(model: EarlyExitGPTModel) -> dict[str, Parameter]:
    """The backbone's trainable parameters on this stage, by their key in `trained_backbone_shards`."""
    shards = trained_backbone_shards(model)
    keys = {id(shard.data): key for key, shard in shards.items()}
    trainable = [parameter for _, parameter in model.backbone_named_parameters() if parameter.requires_grad]
    return {keys[id(parameter)]: parameter for parameter in trainable}


def trained_backbone_shards(model: EarlyExitGPTModel) -> dict:
    """Sharded tensors of all that trains in the backbone, for a training checkpoint; empty with `exits`.

    Copies of the output weight on further stages are replicas of the stored one.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    sharded = model.sharded_backbone_to_save(BACKBONE_PREFIX)
    if model.backbone_output is not None:
        stored = output_weight_key(model.share_embeddings_and_output_weights)
        shard = model.backbone_output.sharded_state_dict(metadata=sharding_metadata())["weight"]
        # Megatron numbers the copy on the last stage 1.
        replica = (2 + model.placement.stage, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        sharded[f"{BACKBONE_PREFIX}backbone_output.weight"] = replace(
            shard, key=f"{BACKBONE_PREFIX}{stored}", replica_id=replica
        )
    return {key: shard for key, shard in sharded.items() if id(getattr(shard, "data", None)) in trainable}


def low_rank_shards(model: EarlyExitGPTModel, prefix: str = "") -> dict:
    """Sharded tensors of the backbone's low-rank updates, keys `<prefix>decoder.layers...low_rank_a|b`."""
    return {key: shard for key, shard in model.sharded_backbone_to_save(prefix).items() if key.endswith(_LOW_RANK)}


def merged_backbone_to_save(model: EarlyExitGPTModel, prefix: str) -> dict:
    """`sharded_backbone_to_save` with every low-rank update W + B A folded into its linear's weight."""
    merged = {
        id(module.base.weight): module.merged_weight()
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) and not name.startswith("exits.")
    }
    sharded = model.sharded_backbone_to_save(prefix)
    return {
        key: replace(shard, data=merged[id(shard.data)]) if id(getattr(shard, "data", None)) in merged else shard
        for key, shard in sharded.items()
        if not key.endswith(_LOW_RANK)
    }


@torch.no_grad()
def initialise_low_rank(model: EarlyExitGPTModel, *, seed: int) -> None:
    """First values of the backbone's low-rank updates: A ~ N(0, 1/in), B zero, the same for every layout."""
    for shard in local_shards(low_rank_shards(model)):
        if shard.key.endswith("low_rank_b"):
            shard.data.zero_()
            continue
        (layer, *start), (_, *shape) = global_chunk(shard)
        rank, width = shard.global_shape[-2:]
        whole = seeded_normal([rank, width], f"{seed}/backbone/{layer}/{shard.key}") / math.sqrt(width)
        rows, columns = (slice(first, first + length) for first, length in zip(start, shape, strict=True))
        shard.data.copy_(whole[rows, columns].view(shard.data.shape))


def what_trains(model: EarlyExitGPTModel) -> str:
    """One line for the log: frozen and trained parameters of this rank's stage, by exit and for the backbone."""
    place = model.placement
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    frozen = sum(p.numel() for p in model.parameters()) - sum(trainable.values())
    exits = {h.exit.name: sum(trainable.get(id(p), 0) for p in h.parameters()) for h in model.exits}
    backbone = sum(trainable.values()) - sum(exits.values())
    trains = ({"backbone": backbone} if backbone else {}) | exits
    return (
        f"stage {place.stage}: layers {place.first_layer}-{place.last_layer}, frozen {frozen:,} parameters on this "
        f"rank, trains {sum(trains.values()):,}: " + (", ".join(f"{k} {v:,}" for k, v in trains.items()) or "nothing")
    )
