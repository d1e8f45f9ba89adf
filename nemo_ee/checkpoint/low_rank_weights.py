# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates that are stored beside a backbone: load them to train further, or read the backbone as W + B A."""

from __future__ import annotations

from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import TensorInfo, WeightSource
from nemo_ee.checkpoint.module_weights import load_shards
from nemo_ee.megatron.model.backbone_training import initialise_low_rank, low_rank_shards
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head_init import local_shards

_A, _B, _WEIGHT = "low_rank_a", "low_rank_b", "weight"


def load_low_rank(model: EarlyExitGPTModel, source: WeightSource | None, *, seed: int) -> None:
    """Fill a stage's low-rank updates from `source`; None initialises them anew.

    Raises:
        ValueError: the stored updates have another rank or other linears than the model's.
    """
    if source is None:
        initialise_low_rank(model, seed=seed)
        return
    stored = stored_rank(source)
    wanted = next(shard.global_shape[-1] for shard in local_shards(low_rank_shards(model)) if shard.key.endswith(_B))
    if stored != wanted:
        raise ValueError(
            f"the file holds low-rank updates of rank {stored}, but model.early_exit.lora.rank={wanted}; "
            f"set model.early_exit.lora.rank={stored}"
        )
    load_shards(low_rank_shards(model), source)


def stored_rank(source: WeightSource) -> int:
    """The rank of stored updates."""
    return next(info.shape[-1] for key, info in source.keys().items() if key.endswith(_B))


class MergedSource:
    """A `WeightSource` of a backbone whose low-rank updates are added as its weights are read.

    W + B A is formed in fp32 for the requested rows and columns, in global coordinates, so any layout reads the same.

    Args:
        backbone: the weights W.
        updates: A and B under the keys of their linears.
    """

    def __init__(self, backbone: WeightSource, updates: WeightSource) -> None:
        self.backbone, self.updates = backbone, updates
        self._updated = updates.keys()

    def keys(self) -> dict[str, TensorInfo]:
        """Every tensor of the backbone by canonical name."""
        return self.backbone.keys()

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """The chunk of `key` with its update, fp32 where there is one. See `WeightSource.read`."""
        weight = self.backbone.read(key, offset, shape, allow_missing_rows=allow_missing_rows)
        stem = key.removesuffix(_WEIGHT)
        if f"{stem}{_A}" not in self._updated:
            return weight
        rank = self._updated[f"{stem}{_A}"].shape[-2]
        *layer, row, column = offset  # the linears' keys are stacked, with the layer axis first
        *layers, rows, columns = shape
        a = self.updates.read(f"{stem}{_A}", (*layer, 0, column), (*layers, rank, columns))
        b = self.updates.read(f"{stem}{_B}", (*layer, row, 0), (*layers, rows, rank))
        return weight.float() + b.float() @ a.float()
