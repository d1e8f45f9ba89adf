# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""KV cache indexed by (slot, sequence, position), and attention over it for ragged batches with grouped queries.

A slot is a layer, or an exit with a layer of its own. Each row attends to its own sequence up to its own position:

    softmax(scale q K^T) V

The facts that depend on the positions alone (rows that attend in one call, their masks, where they write) are a
`Placement`. It is computed once for each `TokenPositions`, not once for each layer.

Exactness: one call serves one row each of neighbouring sequences, or several rows of one sequence. A row's result
equals that of the row alone up to the rounding of PyTorch's attention kernels (1e-6 relative in fp32), not bitwise.

Shapes: n rows, H query heads, K key-value heads, d their size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor

from nemo_ee.generation.decoding_model import SequenceRows, TokenPositions


class Block(NamedTuple):
    """Rows that attend in one call: one row each of some neighbouring sequences, or several rows of one sequence.

    Attributes:
        first_row, stop_row: range of rows.
        first, stop: range of sequences.
        length: number of positions that are read, from position 0.
        mask: added to the scores, 0 or -inf, `[sequences, 1, 1, length]` or `[rows, length]`; None = each row sees all
            positions, or, where `causal`, those up to its own.
        causal: the rows are a whole sequence from position 0 on.
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

    def folded(self, heads_per_key: int) -> Block:
        """With a mask for the query heads of a key-value head as rows of one product, `[rows * heads, length]`."""
        if self.is_one_each or self.causal:
            return self
        return self._replace(mask=self.mask.repeat_interleave(heads_per_key, dim=0))


class Placement:
    """The place of rows in a cache, and the rows that attend in one call.

    Args:
        positions: the rows.
        dtype: dtype of the cache.

    Attributes:
        groups: the rows of each sequence.
        blocks: the attention calls.
    """

    def __init__(self, positions: TokenPositions, dtype: torch.dtype) -> None:
        # No reference to `positions`: it is the weak key under which a cache keeps this object.
        self._sequence, self._position, self.groups = positions.sequence, positions.position, positions.groups
        self._run: SequenceRows | None = None  # all of the rows, where they are consecutive positions of one sequence
        if len(self.groups) == 1 and isinstance(self.groups[0].positions, range):
            self._run = self.groups[0]
        self.blocks = tuple(_blocks(positions, dtype))
        self._folded: tuple[Block, ...] | None = None  # `blocks` as `attend` reads them

    def write(self, keys_values: Tensor, slab: Tensor) -> None:
        """Copy `[n, 2K, d]` to the rows' places in `[sequences, 2K, max_length, d]`."""
        if self._run is None:
            # Advanced indices on both sides of a slice put the rows' axis first: [n, 2K, d].
            slab[self._sequence, :, self._position] = keys_values
        elif keys_values.shape[0] == 1:
            slab[self._run.sequence, :, self._run.length - 1] = keys_values[0]
        else:
            slab[self._run.sequence, :, self._run.positions.start : self._run.length] = keys_values.transpose(0, 1)

    def attend(self, queries: Tensor, slab: Tensor, scale: float) -> Tensor:
        """Attention of `queries` `[n, H, d]` over `slab`. Returns `[n, H d]`."""
        if self._folded is None:
            heads_per_key = 2 * queries.shape[1] // slab.shape[1]
            self._folded = tuple(own.folded(heads_per_key) for own in self.blocks)
        if len(self._folded) == 1:
            return _attend(queries, slab, self._folded[0], scale)
        parts = [_attend(queries[own.first_row : own.stop_row], slab, own, scale) for own in self._folded]
        return torch.cat(parts)


class KVCache:
    """Keys and values of every slot.

    Args:
        slots: hashable ids of the layers and exits that write here.
        num_sequences: sequences 0..num_sequences-1.
        max_length: positions 0..max_length-1.
        num_kv_heads: key-value heads (of this rank).
        head_dim: size of a head.
        dtype, device: dtype and device of the stored keys and values.
        checked: assert that every (slot, sequence, position) is written once, and written before it is read. The
            bookkeeping is in host memory, so it never waits for the device.
    """

    def __init__(
        self,
        slots: Iterable[Hashable],
        num_sequences: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        checked: bool = False,
    ) -> None:
        shape = (num_sequences, 2 * num_kv_heads, max_length, head_dim)
        # Zeros, because positions past a sequence's end are read, and masked, when sequences attend in one call. A
        # masked value must be a number: -inf + NaN and 0 * NaN are NaN.
        self._slabs = {slot: torch.zeros(shape, dtype=dtype, device=device) for slot in slots}
        self.dtype, self.max_length, self._num_kv_heads = dtype, max_length, num_kv_heads
        self._lengths = [0] * num_sequences  # number of positions of each sequence that may have been written
        self._placements: WeakKeyDictionary[TokenPositions, Placement] = WeakKeyDictionary()
        self._written = _Written(self._slabs, num_sequences, max_length) if checked else None

    def place(self, positions: TokenPositions) -> Placement:
        """The place of these rows. Call it before their keys and values are written."""
        for group in positions.groups:
            if group.length > self._lengths[group.sequence]:
                self._lengths[group.sequence] = group.length
        found = self._placements.get(positions)
        if found is None:
            found = self._placements[positions] = Placement(positions, self.dtype)
        return found

    def write(self, slot: Hashable, placement: Placement, keys_values: Tensor) -> None:
        """Store keys and values of new positions.

        Args:
            slot: layer or exit.
            placement: from `place`.
            keys_values: `[n, 2K, d]`, keys first, in the cache's dtype.

        Raises:
            AssertionError: `checked`, and a position is written twice or lies past `max_length`.
        """
        if self._written is not None:
            self._written.mark(slot, placement.groups)
        placement.write(keys_values, self._slabs[slot])

    def attend(self, slot: Hashable, placement: Placement, queries: Tensor, scale: float) -> Tensor:
        """Attend from each row to the positions of its sequence up to its own, which are written.

        Args:
            slot: layer or exit.
            placement: from `place`.
            queries: `[n, H, d]`, in the cache's dtype; head i reads key-value head i // (H / K).
            scale: multiplies the scores.

        Returns:
            `[n, H d]`.

        Raises:
            AssertionError: `checked`, and a position that is read was never written.
        """
        if self._written is not None:
            self._written.require(slot, placement.groups)
        return placement.attend(queries, self._slabs[slot], scale)

    @torch.inference_mode()
    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence in every slot; later ones may be written again.

        In a cache of several sequences they become zeros, because a neighbour's attention call may read them before
        they are written. A single sequence writes a position before it reads it.
        """
        end = self._lengths[sequence]
        self._lengths[sequence] = min(length, end)
        if len(self._lengths) > 1 and length < end:
            for slab in self._slabs.values():
                slab[sequence, :, length:end] = 0
        if self._written is not None:
            self._written.truncate(sequence, length)

    def keys(self, slot: Hashable) -> Tensor:
        """`[num_sequences, K, max_length, d]`, the stored keys; positions that were not written hold anything."""
        return self._slabs[slot][:, : self._num_kv_heads]

    def values(self, slot: Hashable) -> Tensor:
        """`[num_sequences, K, max_length, d]`, the stored values, as `keys`."""
        return self._slabs[slot][:, self._num_kv_heads :]

    def valid(self, slot: Hashable) -> BoolTensor:
        """Which positions of a `checked` cache are written: `[num_sequences, max_length]`, bool, on the host."""
        assert self._written is not None, "only a checked cache has it"
        return torch.tensor([list(written) for written in self._written.of[slot]], dtype=torch.bool)


class _Written:
    """Which positions are written: slot -> sequence -> a byte for each position, 1 = written."""

    def __init__(self, slots: Iterable[Hashable], num_sequences: int, max_length: int) -> None:
        self.of = {slot: [bytearray(max_length) for _ in range(num_sequences)] for slot in slots}
        self._max_length = max_length

    def mark(self, slot: Hashable, groups: Iterable[SequenceRows]) -> None:
        for sequence, _, _, length, span in groups:
            assert length <= self._max_length, f"slot {slot}: position {length - 1} is past {self._max_length}"
            written = self.of[slot][sequence]
            for run in [span] if isinstance(span, range) else [range(p, p + 1) for p in span]:
                twice = written.find(1, run.start, run.stop)
                assert twice < 0, f"slot {slot}: {(sequence, twice)} is written for the second time"
                written[run.start : run.stop] = b"\1" * len(run)

    def require(self, slot: Hashable, groups: Iterable[SequenceRows]) -> None:
        for group in groups:
            gap = self.of[slot][group.sequence].find(0, 0, group.length)
            assert gap < 0, f"slot {slot}: {(group.sequence, gap)} is attended to but was never written"

    def truncate(self, sequence: int, length: int) -> None:
        for written in self.of.values():
            written[sequence][length:] = bytes(self._max_length - length)


def _blocks(positions: TokenPositions, dtype: torch.dtype) -> Iterator[Block]:
    alike: list[SequenceRows] = []  # neighbouring sequences with one row each
    for group in positions.groups:
        single = group.first_row == group.last_row
        if alike and not (single and group.sequence == alike[-1].sequence + 1):
            yield _one_each(alike, positions, dtype)
            alike = []
        if single:
            alike.append(group)
        else:
            yield _several_of_one(group, positions, dtype)
    if alike:
        yield _one_each(alike, positions, dtype)


def _one_each(groups: list[SequenceRows], positions: TokenPositions, dtype: torch.dtype) -> Block:
    first, last = groups[0], groups[-1]
    length, mask = max(group.length for group in groups), None
    if min(group.length for group in groups) < length:
        own = positions.position[first.first_row : last.last_row + 1]
        mask = _mask(own, length, dtype)[:, None, None]
    return Block(first.first_row, last.last_row + 1, first.sequence, last.sequence + 1, length, mask, causal=False)


def _several_of_one(group: SequenceRows, positions: TokenPositions, dtype: torch.dtype) -> Block:
    causal, mask = isinstance(group.positions, range) and group.positions.start == 0, None
    if not causal:
        own = positions.position[group.first_row : group.last_row + 1]
        mask = _mask(own, group.length, dtype)
    return Block(
        group.first_row, group.last_row + 1, group.sequence, group.sequence + 1, group.length, mask, causal=causal
    )


def _mask(position: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`[m]` -> `[m, length]`: 0 up to the row's position, -inf past it. Numbers cost a layer less than booleans."""
    past = torch.arange(length, device=position.device) > position[:, None]
    return torch.zeros(past.shape, dtype=dtype, device=position.device).masked_fill_(past, -math.inf)


def _attend(queries: Tensor, slab: Tensor, block: Block, scale: float) -> Tensor:
    """The attention of one block. `queries`: its `[m, H, d]`. Returns `[m, H d]`."""
    count, num_kv = queries.shape[0], slab.shape[1] // 2
    seen = slab[block.first : block.stop, :, : block.length]
    keys, values = seen[:, :num_kv], seen[:, num_kv:]
    # [m, H, d] -> [m, K, H/K, d]: the query heads of a key-value head are rows of one product.
    rows = queries.reshape(count, num_kv, -1, queries.shape[-1])
    if block.is_one_each:
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=block.mask, scale=scale)
        return attended.reshape(count, -1)
    if not block.causal:
        rows = rows.transpose(0, 1).reshape(1, num_kv, -1, queries.shape[-1])  # rows first, then heads
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=block.mask, scale=scale)
        return attended.view(num_kv, count, -1, queries.shape[-1]).transpose(0, 1).reshape(count, -1)
    # [m, H, d] -> [1, H, m, d]
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1).reshape(count, -1)
