# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values by explicit position, so that a sequence's layers may be filled to different lengths.

Every (slot, sequence, position) is written once and must be written before it is attended to; both are asserted.
Attention is softmax(scale q K^T) V over the item's own sequence up to its own position, with grouped queries.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor

from nemo_ee.generation.decoding_model import TokenPositions


class KVCache:
    """Keys and values of every slot (a layer, or an exit that attends).

    Args:
        slots: hashable ids of the layers and exits that write here.
        num_sequences: sequences 0..num_sequences-1.
        max_length: positions 0..max_length-1.
        num_kv_heads: key/value heads (of this rank).
        head_dim: their size.
        dtype, device: of the stored keys and values.
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
    ) -> None:
        shape = (num_sequences, num_kv_heads, max_length, head_dim)
        slots = tuple(slots)
        self.max_length = max_length
        self._keys = {slot: torch.empty(shape, dtype=dtype, device=device) for slot in slots}
        self._values = {slot: torch.empty(shape, dtype=dtype, device=device) for slot in slots}
        # slot -> sequence -> a byte per position, 1 = written. Plain bytes on the host: checking them costs next to
        # nothing beside a tensor operation and never makes a device wait.
        self._written = {slot: [bytearray(max_length) for _ in range(num_sequences)] for slot in slots}

    def write(self, slot: Hashable, positions: TokenPositions, key: Tensor, value: Tensor) -> None:
        """Store keys and values of new positions.

        Args:
            slot: layer or exit.
            positions: n pairs, none of which was written to this slot before.
            key, value: `[n, num_kv_heads, head_dim]`.

        Raises:
            AssertionError: a position is written twice, or lies past `max_length`.
        """
        self._mark(slot, positions)
        keys, values = self._keys[slot], self._values[slot]
        if len(positions.groups) == 1 and isinstance(positions.groups[0].positions, range):
            sequence, _, _, length, span = positions.groups[0]
            keys[sequence, :, span.start : length] = key.transpose(0, 1)
            values[sequence, :, span.start : length] = value.transpose(0, 1)
        else:
            # Advanced indices on both sides of a slice put the positions' axis first: [n, num_kv_heads, head_dim].
            keys[positions.sequence, :, positions.position] = key.to(keys.dtype)
            values[positions.sequence, :, positions.position] = value.to(values.dtype)

    def _mark(self, slot: Hashable, positions: TokenPositions) -> None:
        for group in positions.groups:
            sequence, length, span = group.sequence, group.length, group.positions
            assert length <= self.max_length, f"slot {slot}: position {length - 1} is past {self.max_length}"
            written = self._written[slot][sequence]
            for run in [span] if isinstance(span, range) else [range(p, p + 1) for p in span]:
                twice = written.find(1, run.start, run.stop)
                assert twice < 0, f"slot {slot}: {(sequence, twice)} is written for the second time"
                written[run.start : run.stop] = b"\1" * len(run)

    def attend(self, slot: Hashable, query: Tensor, positions: TokenPositions, scale: float) -> Tensor:
        """Attend from each item to the positions of its sequence up to its own.

        Args:
            slot: layer or exit, with every position up to the positions' own written.
            query: `[n, num_heads, head_dim]`; head i reads key/value head i // (num_heads / num_kv_heads).
            positions: n pairs.
            scale: multiplies the scores.

        Returns:
            `[n, num_heads, head_dim]`.

        Raises:
            AssertionError: a position that should be seen was never written.
        """
        outputs = []
        for sequence, first, last, length, _ in positions.groups:
            gap = self._written[slot][sequence].find(0, 0, length)
            assert gap < 0, f"slot {slot}: {(sequence, gap)} is attended to but was never written"
            outputs.append(
                _attend(
                    query[first : last + 1],
                    self._keys[slot][sequence, :, :length],
                    self._values[slot][sequence, :, :length],
                    positions.position[first : last + 1],
                    scale,
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def valid(self, slot: Hashable) -> BoolTensor:
        """Which positions are written. Returns `[num_sequences, max_length]`, bool, on the host."""
        return torch.tensor([list(written) for written in self._written[slot]], dtype=torch.bool)

    def keys(self, slot: Hashable) -> Tensor:
        """`[num_sequences, num_kv_heads, max_length, head_dim]`, the keys; unwritten positions hold anything."""
        return self._keys[slot]

    def values(self, slot: Hashable) -> Tensor:
        """`[num_sequences, num_kv_heads, max_length, head_dim]`, the stored values, as `keys`."""
        return self._values[slot]

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence in every slot; the rest may be written again."""
        for written in self._written.values():
            written[sequence][length:] = bytes(self.max_length - length)


def _attend(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """One sequence. `query`: `[m, heads, d]`; `keys`, `values`: `[kv, length, d]`; `position`: `[m]`, the last one is
    length - 1. Returns `[m, heads, d]`."""
    count, num_heads, head_dim = query.shape
    num_kv_heads, length, _ = keys.shape
    per_kv_head = num_heads // num_kv_heads
    # [m, kv * g, d] -> [kv, m * g, d]: the g query heads of a key/value head become rows of one product.
    rows = query.reshape(count, num_kv_heads, per_kv_head, head_dim).transpose(0, 1)
    rows = rows.reshape(1, num_kv_heads, count * per_kv_head, head_dim)
    mask = None
    if count > 1:
        seen = torch.arange(length, device=query.device) <= position[:, None]  # [m, length]
        mask = seen.repeat_interleave(per_kv_head, dim=0)
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    attended = F.scaled_dot_product_attention(rows, keys[None], values[None], attn_mask=mask, scale=scale)
    # [kv, m * g, d] -> [m, kv * g, d]
    attended = attended.view(num_kv_heads, count, per_kv_head, head_dim).transpose(0, 1)
    return attended.reshape(count, num_heads, head_dim)
