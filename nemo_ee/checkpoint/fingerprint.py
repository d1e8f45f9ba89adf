# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a backbone and of exits: sha256 over canonical names, global shapes, dtypes and contents.

They do not depend on the sharding or the format of a checkpoint. Exits name their backbone by
its fingerprint, and certificates name both. Padding rows of the vocabulary, whose number depends on the layout, are
left out when the true vocabulary size is given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import TensorInfo, WeightSource

# The parts of a backbone; everything else in a checkpoint (exits, optimizers) is not part of it.
BACKBONE_COMPONENTS = ("embedding", "decoder", "output_layer")
_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
_STACKED = "decoder.layers."
_BLOCK_BYTES = 256 << 20
_FORMAT = b"nemo_ee backbone fingerprint 1\n"
_EXITS_FORMAT = b"nemo_ee exits fingerprint 1\n"
# An exit's matrices with a row per vocabulary entry.
_EXIT_VOCABULARY_KEYS = (".output.weight", ".output_update.low_rank_b")


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
        vocab_size: number of rows of the two vocabulary matrices that are hashed; None = all stored rows. With it,
            checkpoints that differ in padding only have the same fingerprint.
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
    _hash_tensors(digest, source, keys, _VOCABULARY_KEYS, vocab_size, on_bytes)
    return digest.hexdigest()


def exits_fingerprint(
    exits: WeightSource,
    placement: Iterable[str],
    *,
    updates: WeightSource | None = None,
    vocab_size: int | None = None,
) -> str:
    """Hashes the placement of exits, all their tensors, and low-rank updates that are stored beside the backbone.

    Args:
        exits: their weights, named `<exit>.<parameter>`.
        placement: a line per exit, in order, with its layer, architecture and output, which its weights do not have.
        updates: the weights in `lora_weights/`; None = there are none.
        vocab_size: number of rows of the exits' vocabulary matrices that are hashed; None = all stored rows.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: an exit has fewer rows than `vocab_size`.
    """
    digest = hashlib.sha256(_EXITS_FORMAT)
    for line in placement:
        digest.update(f"{line}\n".encode())
    for source in (exits, updates):
        digest.update(b"\n")
        if source is not None:
            keys = {key: info for key, info in sorted(source.keys().items()) if "_extra_state" not in key}
            _hash_tensors(digest, source, keys, _EXIT_VOCABULARY_KEYS, vocab_size, None)
    return digest.hexdigest()


def _hash_tensors(
    digest: Any,
    source: WeightSource,
    keys: dict[str, TensorInfo],
    vocabulary_keys: tuple[str, ...],
    vocab_size: int | None,
    on_bytes: Callable[[int], object] | None,
) -> None:
    for key, info in keys.items():
        shape = info.shape
        if vocab_size is not None and key.endswith(vocabulary_keys):
            if shape[0] < vocab_size:
                raise ValueError(f"{key} has {shape[0]} rows, fewer than the vocabulary size {vocab_size}")
            shape = (vocab_size, *shape[1:])
        # The line determines the number of bytes that follow, so different sets of tensors never hash the same stream.
        digest.update(f"{key} {str(info.dtype).removeprefix('torch.')} {list(shape)}\n".encode())
        for offset, block in _blocks(key, shape, info.dtype):
            content = tensor_bytes(source.read(key, offset, block))
            digest.update(content)
            if on_bytes is not None:
                on_bytes(len(content))


def _blocks(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of consecutive blocks of rows (for stacked tensors: single layers) in memory order."""
    if not shape:
        yield (), ()
        return
    row_bytes = max(math.prod(shape[1:]) * dtype.itemsize, 1)
    rows = 1 if key.startswith(_STACKED) else max(_BLOCK_BYTES // row_bytes, 1)
    for start in range(0, shape[0], rows):
        yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in memory order, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
