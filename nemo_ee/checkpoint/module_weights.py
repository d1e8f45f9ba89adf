# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fill a module's parameters, on any layout, from any source of global tensors.

Megatron's loader cannot read a part of a layer stack. Reading chunks (key, offset, shape) can, and the same code reads
Hugging Face directories.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.megatron.model.exit_head_init import global_chunk, local_shards


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


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...], *, rows_may_differ: bool) -> bool:
    return stored == wanted or (rows_may_differ and stored[1:] == wanted[1:])


def cast_shards(sharded_state_dict: dict, dtypes: Mapping[str, torch.dtype]) -> None:
    """Store floating-point weights in the dtypes of the source, in place.

    Args:
        sharded_state_dict: Megatron's sharded state dict of a backbone, keys with or without `model.` in front.
        dtypes: canonical name -> dtype in the source.
    """
    for value in sharded_state_dict.values():
        data = getattr(value, "data", None)
        dtype = dtypes.get(str(getattr(value, "key", "")).removeprefix("model."))
        if dtype is not None and isinstance(data, torch.Tensor) and data.is_floating_point():
            value.data = data.detach().to(dtype)
            if hasattr(value, "dtype"):
                value.dtype = dtype
