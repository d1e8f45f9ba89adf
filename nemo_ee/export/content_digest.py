# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A digest of a model's tensors, independent of files, their order and their metadata.

    sha256 of the lines "<name> <dtype> <shape> <sha256 of the bytes>\\n", sorted; dtype as in safetensors, shape 2x3

The bytes are the tensor's in memory order, little-endian, as safetensors stores them. Two exports with the same digest
hold the same numbers under the same names. The digest can be computed from the source `.nemo` too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from nemo_ee.checkpoint.fingerprint import tensor_bytes


class ContentDigest:
    """Computes the digest from tensors in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def passing(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Hash the chunks of a tensor and yield them; the tensor counts when all its chunks have been read.

        Args:
            dtype: name of the dtype as in safetensors, such as `F32`.
            chunks: consecutive pieces of the tensor in memory order.
        """
        content = hashlib.sha256()
        for chunk in chunks:
            content.update(tensor_bytes(chunk))
            yield chunk
        self._lines.append(f"{name} {dtype} {'x'.join(map(str, shape))} {content.hexdigest()}\n")

    def hexdigest(self) -> str:
        """The digest of all tensors so far, in hexadecimal."""
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()
