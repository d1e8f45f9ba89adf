# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight files of an exported Hugging Face directory: one tensor in memory at a time, sharded, with a digest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_ee.export.content_digest import ContentDigest
from nemo_ee.export.huggingface.exported_tensors import Reading, parts_of
from nemo_ee.export.safetensors_writer import DTYPE_NAMES, SafetensorsWriter
from nemo_ee.export.source import EarlyExitSource


def write_json(path: Path, values: Any) -> None:
    """As transformers writes it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def num_bytes(reading: Reading, dtype: torch.dtype) -> int:
    """What a reading takes in the files."""
    return sum(math.prod(piece.shape) for piece in reading.written) * dtype.itemsize


def write_weights(
    folder: Path,
    plan: Sequence[Reading],
    source: EarlyExitSource,
    dtype: torch.dtype,
    shard_bytes: float,
    on_bytes: Callable[[int], Any],
) -> str:
    """Write `model.safetensors`, or several files and their index.

    Args:
        shard_bytes: about the largest size of one file.
        on_bytes: called with the number of bytes written.

    Returns:
        The `ContentDigest` of the tensors.
    """
    shards: list[list[Reading]] = [[]]
    filled = 0
    for reading in plan:
        size = num_bytes(reading, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(reading)
        filled += size
    many = len(shards) > 1
    weight_map: dict[str, str] = {}
    digest = ContentDigest()
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        entries = {piece.name: (dtype, piece.shape) for reading in shard for piece in reading.written}
        with SafetensorsWriter(folder / name, entries) as writer:
            for reading in shard:
                _write_reading(writer, reading, source, dtype, digest, on_bytes)
        weight_map |= dict.fromkeys(entries, name)
    if many:
        total = sum(num_bytes(reading, dtype) for reading in plan)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return digest.hexdigest()


def _write_reading(
    writer: SafetensorsWriter,
    reading: Reading,
    source: EarlyExitSource,
    dtype: torch.dtype,
    digest: ContentDigest,
    on_bytes: Callable,
) -> None:
    if not reading.written:
        return
    tensor = source.read(reading.origin, reading.shape, dtype)
    for piece in reading.written:
        parts = parts_of(tensor, piece)
        writer.write(piece.name, digest.passing(piece.name, DTYPE_NAMES[dtype], piece.shape, parts))
        on_bytes(math.prod(piece.shape) * dtype.itemsize)
