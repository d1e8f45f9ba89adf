# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fill a module's parameters, on any layout, from any source of global tensors.

Megatron's loader cannot read a part of a layer stack. Reading chunks (key, offset, shape) can, and the same code reads
Hugging Face directories.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import global_chunk, initialise_exit_head, local_shards


@torch.no_grad()
def load_shards(sharded_state_dict: dict, source: WeightSource) -> None:
    """Copy every shard's chunk from `source` into its parameter, in place.

    Args:
        sharded_state_dict: Megatron's sharded state dict of a module, keys as in `source`. Tensors that allow a shape
            mismatch (padded vocabularies) get zeros for rows that the source does not hold.
        source: the weights.

    Raises:
        ValueError: tensors are missing or have another shape than the model's; the message lists them.
    """
    shards = local_shards(sharded_state_dict)
    known = source.keys()
    missing = sorted({shard.key for shard in shards} - known.keys())
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's tensors: {', '.join(missing)}; the model config and "
            "the checkpoint do not belong together, or the checkpoint is incomplete"
        )
    wrong = [
        f"{shard.key}: {known[shard.key].shape} in the checkpoint, {tuple(shard.global_shape)} in the model"
        for shard in shards
        if not _fits(known[shard.key].shape, tuple(shard.global_shape), rows_may_differ=shard.allow_shape_mismatch)
    ]
    if wrong:
        raise ValueError("tensors of the wrong shape; check the model config:\n  " + "\n  ".join(sorted(set(wrong))))
    for shard in shards:
        offset, shape = global_chunk(shard)
        chunk = source.read(shard.key, offset, shape, allow_missing_rows=shard.allow_shape_mismatch)
        shard.data.copy_(chunk.view(shard.data.shape))


def load_exits(model: EarlyExitGPTModel, backbone: WeightSource, exits: WeightSource | None, *, seed: int) -> None:
    """Fill a stage's exits in place: from `exits` where they are stored, else by their `init`.

    Args:
        model: the stage, on whatever layout.
        backbone: the backbone's tensors under canonical keys, from which exits are initialised.
        exits: tuned exits, keys `<exit name>.<parameter>`, or None.
        seed: seed of random initialisation, for exits without a seed of their own.

    Raises:
        ValueError: model and weights do not belong together.
    """
    stored = {key.split(".", 1)[0] for key in exits.keys()} if exits is not None else set()
    for head in model.exits:
        if head.exit.name in stored:
            load_shards(head.sharded_state_dict(f"{head.exit.name}."), exits)
            continue
        initialise_exit_head(
            head,
            partial(backbone.read, allow_missing_rows=True),
            num_layers=model.config.num_layers,
            vocab_size=model.true_vocab_size,
            tied=model.share_embeddings_and_output_weights,
            std=model.config.init_method_std,
            seed=seed,
        )


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...], *, rows_may_differ: bool) -> bool:
    return stored == wanted or (rows_may_differ and stored[1:] == wanted[1:])


def cast_shards(sharded_state_dict: dict, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> None:
    """Store floating-point weights in other dtypes, in place.

    Args:
        sharded_state_dict: Megatron's sharded state dict, keys of a backbone with or without `model.` in front.
        dtypes: one for all, or canonical name -> dtype in the source.
    """
    for value in sharded_state_dict.values():
        data = getattr(value, "data", None)
        key = str(getattr(value, "key", "")).removeprefix("model.")
        dtype = dtypes.get(key) if isinstance(dtypes, Mapping) else dtypes
        if dtype is not None and isinstance(data, torch.Tensor) and data.is_floating_point():
            value.data = data.detach().to(dtype)
            if hasattr(value, "dtype"):
                value.dtype = dtype
