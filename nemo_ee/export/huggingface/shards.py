# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight files of a Hugging Face directory: the file of each tensor, and the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_ee.export.readings import Reading, shapes_by_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def sharded(plan: Sequence[Reading], dtype: torch.dtype, shard_bytes: float) -> list[list[Reading]]:
    """The readings of each file; `shard_bytes`: approximate largest size of a file."""
    shards: list[list[Reading]] = [[]]
    filled = 0
    for reading in plan:
        size = reading.num_elements * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(reading)
        filled += size
    many = len(shards)
    return [
        [reading.in_files(lambda _, number=number: _file_name(number, many)) for reading in shard]
        for number, shard in enumerate(shards, 1)
    ]


def _file_name(number: int, many: int) -> str:
    return SINGLE if many == 1 else f"model-{number:05d}-of-{many:05d}.safetensors"


def index_file(shards: Sequence[Sequence[Reading]], dtype: torch.dtype) -> dict[str, Any]:
    """Name -> content of the index of several files; empty for one file."""
    if len(shards) == 1:
        return {}
    plan = [reading for shard in shards for reading in shard]
    total = sum(reading.num_elements for reading in plan) * dtype.itemsize
    places = {name: file for file, shapes in shapes_by_file(plan).items() for name in shapes}
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": places}}
