# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values by position, where items stand in them, and attention over them.

What depends on the items alone (which rows attend together, which positions they see, where they write) is worked out
once per flight (`Placement`), not once per layer.

Shapes: n items, H query heads, K key-value heads, d their size.
May import: torch, nemo_ee.generation.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .early_exit_generation_items import ItemGroup, Items


class RuntimeCache:
    """Keys and values by position: per slot (a layer, or an exit that attends) `[sequences, 2K, max_length, d]`."""

    def __init__(
        self, slots: list[Hashable], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, because positions past a sequence's end are read, and masked, when sequences are attended to together:
        # what is masked must be a number, as neither -inf + NaN nor 0 * NaN is nothing.
        self.slabs = {slot: torch.zeros(shape, dtype=dtype, device=device) for slot in slots}
        self._lengths = [0] * shape[0]  # positions of each sequence that may have been written

    def reach(self, groups: Iterable[ItemGroup]) -> None:
        """Keys and values of these items are about to be written, in some slot or other."""
        for group in groups:
            if group.length > self._lengths[group.sequence]:
                self._lengths[group.sequence] = group.length

    @torch.inference_mode()
    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence. The others become zeros again where it has neighbours,
        beside whom they may be read before they are written; alone it writes a place before it reads it."""
        end = self._lengths[sequence]
        self._lengths[sequence] = min(length, end)
        if len(self._lengths) > 1 and length < end:
            for slab in self.slabs.values():
                slab[sequence, :, length:end] = 0


class Block(NamedTuple):
    """Rows that attend in one call: one row of each of some neighbouring sequences, or several rows of one sequence.

    Attributes:
        first_row, stop_row: of the items.
        first, stop: sequences.
        length: positions to look at, from 0.
        mask: added to the scores, 0 or -inf, `[sequences, 1, 1, length]` or `[rows, length]`; None = each row sees all
            of them, or, where `causal`, those up to its own.
        causal: a whole sequence from its first position on.
    """

    first_row: int
    stop_row: int
    first: int
    stop: int
    length: int
    mask: Tensor | None
    causal: bool

    @property
    def is_one_each(self) -> bool:
        """Whether there is one row of each sequence."""
        return self.stop_row - self.first_row == self.stop - self.first


class Placement:
    """Where items stand in a cache, and with whom they attend. `dtype`: the cache's."""

    def __init__(self, items: Items, dtype: torch.dtype) -> None:
        # Not the items, which keep it.
        self._sequence, self._position = items.sequence, items.position
        groups = items.groups
        self.run: ItemGroup | None = None  # all of the items, where they are consecutive ones of one sequence
        if len(groups) == 1 and isinstance(groups[0].positions, range):
            self.run = groups[0]
        self.blocks = tuple(_blocks(items, dtype))

    def write(self, keys_values: Tensor, slab: Tensor) -> None:
        """Store `[n, 2K, d]` at the items' places in `[sequences, 2K, max_length, d]`."""
        if self.run is None:
            # Advanced indices on both sides of a slice put the items' axis first: [n, 2K, d].
            slab[self._sequence, :, self._position] = keys_values
        elif keys_values.shape[0] == 1:
            slab[self.run.sequence, :, self.run.length - 1] = keys_values[0]
        else:
            slab[self.run.sequence, :, self.run.positions.start : self.run.length] = keys_values.transpose(0, 1)

    def attend(self, queries: Tensor, slab: Tensor, scale: float) -> Tensor:
        """Every item sees its sequence up to itself.

        Args:
            queries: `[n, H, d]`, in the slab's dtype.
            slab: `[sequences, 2K, max_length, d]`, the items' own keys and values written.
            scale: multiplies the scores.

        Returns:
            `[n, H d]`.
        """
        if len(self.blocks) == 1:
            return _attend(queries, slab, self.blocks[0], scale)
        return torch.cat(
            [_attend(queries[block.first_row : block.stop_row], slab, block, scale) for block in self.blocks]
        )


def _blocks(items: Items, dtype: torch.dtype) -> Iterator[Block]:
    alike: list[ItemGroup] = []  # neighbours of one item each
    for group in items.groups:
        single = group.first_row == group.last_row
        if alike and not (single and group.sequence == alike[-1].sequence + 1):
            yield _neighbours(alike, items, dtype)
            alike = []
        if single:
            alike.append(group)
        else:
            yield _several_of_one(group, items, dtype)
    if alike:
        yield _neighbours(alike, items, dtype)


def _neighbours(groups: list[ItemGroup], items: Items, dtype: torch.dtype) -> Block:
    first, last = groups[0], groups[-1]
    length, mask = max(group.length for group in groups), None
    if min(group.length for group in groups) < length:
        own = items.position[first.first_row : last.last_row + 1]
        mask = _mask(own, length, dtype)[:, None, None]
    return Block(first.first_row, last.last_row + 1, first.sequence, last.sequence + 1, length, mask, causal=False)


def _several_of_one(group: ItemGroup, items: Items, dtype: torch.dtype) -> Block:
    causal, mask = isinstance(group.positions, range) and group.positions.start == 0, None
    if not causal:
        own = items.position[group.first_row : group.last_row + 1]
        mask = _mask(own, group.length, dtype)
    return Block(
        group.first_row, group.last_row + 1, group.sequence, group.sequence + 1, group.length, mask, causal=causal
    )


def _mask(position: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`[m]` -> `[m, length]`: 0 up to the row's position, -inf behind it. A number costs a layer less than a bool."""
    behind = torch.arange(length, device=position.device) > position[:, None]
    return torch.zeros(behind.shape, dtype=dtype, device=position.device).masked_fill_(behind, -math.inf)


def _attend(queries: Tensor, slab: Tensor, block: Block, scale: float) -> Tensor:
    """One block. `queries`: its `[m, H, d]`. Returns `[m, H d]`."""
    count, num_kv = queries.shape[0], slab.shape[1] // 2
    seen = slab[block.first : block.stop, :, : block.length]
    keys, values = seen[:, :num_kv], seen[:, num_kv:]
    if block.is_one_each:
        # [m, H, d] -> [m, K, H/K, d]: the query heads of a key-value head are rows of one product.
        rows = queries.reshape(count, num_kv, -1, queries.shape[-1])
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=block.mask, scale=scale)
        return attended.reshape(count, -1)
    # [m, H, d] -> [1, H, m, d]
    rows = queries.transpose(0, 1)[None]
    attended = F.scaled_dot_product_attention(
        rows, keys, values, attn_mask=block.mask, is_causal=block.causal, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1).reshape(count, -1)
