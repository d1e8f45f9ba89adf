# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A digest of a model's tensors that depends on nothing else: not on files, their order or their metadata.

    sha256 of the lines "<name> <dtype> <shape> <sha256 of the bytes>\\n", sorted; dtype as in safetensors, shape 2x3

The bytes are the tensor's in memory order, little-endian, as safetensors stores them. Two exports with the same digest
hold the same numbers under the same names, and the `.nemo` they came from gives the digest again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from nemo_ee.checkpoint.fingerprint import tensor_bytes


class ContentDigest:
    """Takes tensors one by one, in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def passing(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Gives the chunks of a tensor on, having hashed them; it counts once all of them are taken.

        Args:
            dtype: as in safetensors, `F32`.
            chunks: pieces that make up the tensor, one after the other in memory order.
        """
        content = hashlib.sha256()
        for chunk in chunks:
            content.update(tensor_bytes(chunk))
            yield chunk
        self._lines.append(f"{name} {dtype} {'x'.join(map(str, shape))} {content.hexdigest()}\n")

    def hexdigest(self) -> str:
        """Of all tensors so far, in hexadecimal."""
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()
