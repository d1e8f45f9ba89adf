# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints (format torch_dist) that every supported Megatron-core reads, whichever wrote them.

Megatron's own loader does not read all of them: 0.13 and 0.14 lack a class that 0.15 stores in `.metadata`, and 0.19
stores the unsharded part in a place where earlier versions do not search. Tensors are read chunk by chunk instead, so
the layout may be another one too, and nothing in the files is executed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.module_weights import load_shards

_SHARDED = (ShardedTensor, ShardedTensorFactory)


def save_distributed(sharded: dict[str, Any], folder: str | Path) -> None:
    """Write a sharded state dict. Every rank must call it, each with the shards it holds.

    Args:
        sharded: nested dict of Megatron's sharded tensors and of plain values, the latter the same on every rank.
        folder: an empty folder that all ranks see; made if it is missing.
    """
    folder = Path(folder)
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_mapped(sharded, lambda value: value), str(folder))  # it changes the dicts it is given


@torch.no_grad()
def load_distributed(sharded: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Read the tensors of a sharded state dict, in place. Ranks need not call it together.

    Args:
        sharded: nested dict of Megatron's sharded tensors, as it was saved, on whatever layout.
        folder: the checkpoint.

    Returns:
        The same nesting, each sharded tensor replaced by its data: what a `load_state_dict` takes.

    Raises:
        ValueError: tensors are missing, damaged or of another shape; the folder is no such checkpoint.
    """
    load_shards(sharded, ChunkReader(folder, prefix=""))
    return _mapped(sharded, lambda value: value.data if isinstance(value, _SHARDED) else value)


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same nesting in new dicts, `leaf` of everything that is no dict."""
    return {key: _mapped(item, leaf) for key, item in value.items()} if isinstance(value, dict) else leaf(value)
