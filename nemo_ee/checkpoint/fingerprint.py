# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A backbone's fingerprint: sha256 over its canonical names, global shapes, dtypes and contents.

It does not depend on how a checkpoint was sharded or in which format it is stored, so exits and certificates can
name the backbone that they belong to. Padding rows of the vocabulary, whose number depends on the layout, are left
out when the true vocabulary size is given.

May import: torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import TensorInfo, WeightSource

# What a backbone consists of; everything else in a checkpoint (exits, optimizers) is not part of it.
BACKBONE_COMPONENTS = ("embedding", "decoder", "output_layer")
_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
_STACKED = "decoder.layers."
_BLOCK_BYTES = 256 << 20
_FORMAT = b"nemo_ee backbone fingerprint 1\n"


def backbone_keys(source: WeightSource) -> dict[str, TensorInfo]:
    """The tensors of `source` that belong to the backbone, sorted by name."""
    return {
        key: info
        for key, info in sorted(source.keys().items())
        if key.split(".")[0] in BACKBONE_COMPONENTS and "_extra_state" not in key
    }


def backbone_fingerprint(
    source: WeightSource, *, vocab_size: int | None = None, on_bytes: Callable[[int], object] | None = None
) -> str:
    """Hashes every backbone tensor, a layer or a block of rows at a time.

    Args:
        source: the weights.
        vocab_size: rows of the two vocabulary matrices that count; None for all that are stored. With it, checkpoints
            that differ in padding only have the same fingerprint.
        on_bytes: called with the number of bytes after each block, for a progress bar.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: no backbone in `source`, or it has fewer rows than `vocab_size`.
    """
    keys = backbone_keys(source)
    if not keys:
        raise ValueError("no backbone to fingerprint: the source holds none of embedding.*, decoder.*, output_layer.*")
    digest = hashlib.sha256(_FORMAT)
    for key, info in keys.items():
        shape = info.shape
        if vocab_size is not None and key in _VOCABULARY_KEYS:
            if shape[0] < vocab_size:
                raise ValueError(f"{key} has {shape[0]} rows, fewer than the vocabulary size {vocab_size}")
            shape = (vocab_size, *shape[1:])
        # The line says how many bytes follow, so no two different sets of tensors hash the same stream.
        digest.update(f"{key} {str(info.dtype).removeprefix('torch.')} {list(shape)}\n".encode())
        for offset, block in _blocks(key, shape, info.dtype):
            content = _bytes(source.read(key, offset, block))
            digest.update(content)
            if on_bytes is not None:
                on_bytes(len(content))
    return digest.hexdigest()


def _blocks(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of consecutive blocks of rows (for stacked tensors: single layers) in memory order."""
    if not shape:
        yield (), ()
        return
    row_bytes = max(math.prod(shape[1:]) * dtype.itemsize, 1)
    rows = 1 if key.startswith(_STACKED) else max(_BLOCK_BYTES // row_bytes, 1)
    for start in range(0, shape[0], rows):
        yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in memory order, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
