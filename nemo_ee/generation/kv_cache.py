# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values by explicit position, so that a sequence's layers may be filled to different lengths.

Every (slot, sequence, position) is written once and must be written before it is attended to; both are asserted.
Attention is softmax(scale q K^T) V over the item's own sequence up to its own position, with grouped queries.

May import: torch and `nemo_ee.generation.items`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor

from nemo_ee.generation.items import Items


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
        # On the host: the assertions below must not make a device wait.
        self._valid = {slot: torch.zeros(num_sequences, max_length, dtype=torch.bool) for slot in slots}

    def write(self, slot: Hashable, items: Items, key: Tensor, value: Tensor) -> None:
        """Store keys and values of new positions.

        Args:
            slot: layer or exit.
            items: n pairs, none of which was written to this slot before.
            key, value: `[n, num_kv_heads, head_dim]`.

        Raises:
            AssertionError: a position is written twice, or lies past `max_length`.
        """
        valid = self._valid[slot]
        on_host = items.on_host
        assert all(group.length <= self.max_length for group in items.groups), f"slot {slot}: past {self.max_length}"
        assert not bool(valid[on_host].any()), f"slot {slot}: a (sequence, position) is written for the second time"
        valid[on_host] = True
        # Advanced indices on both sides of a slice put the items' axis first: [n, num_kv_heads, head_dim].
        self._keys[slot][items.sequence, :, items.position] = key.to(self._keys[slot].dtype)
        self._values[slot][items.sequence, :, items.position] = value.to(self._values[slot].dtype)

    def attend(self, slot: Hashable, query: Tensor, items: Items, scale: float) -> Tensor:
        """Attend from each item to the positions of its sequence up to its own.

        Args:
            slot: layer or exit, with every position up to the items' own written.
            query: `[n, num_heads, head_dim]`; head i reads key/value head i // (num_heads / num_kv_heads).
            items: n pairs.
            scale: multiplies the scores.

        Returns:
            `[n, num_heads, head_dim]`.

        Raises:
            AssertionError: a position that should be seen was never written.
        """
        keys, values, valid = self._keys[slot], self._values[slot], self._valid[slot]
        output = torch.empty_like(query)
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        for sequence, first, last, length in items.groups:
            assert bool(valid[sequence, :length].all()), f"slot {slot}: sequence {sequence} has a gap before {length}"
            count = last + 1 - first
            # [m, kv * g, d] -> [kv, m * g, d]: the g query heads of a key/value head become rows of one product.
            rows = query[first : last + 1].unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
            per_kv_head = rows.shape[2]
            mask = None
            if count > 1:
                position = items.position[first : last + 1]
                seen = torch.arange(length, device=query.device) <= position[:, None]  # [m, length]
                mask = seen.repeat_interleave(per_kv_head, dim=0)
            attended = F.scaled_dot_product_attention(
                rows.flatten(1, 2)[None],
                keys[None, sequence, :, :length].to(query.dtype),
                values[None, sequence, :, :length].to(query.dtype),
                attn_mask=mask,
                scale=scale,
            )[0]
            # [kv, m * g, d] -> [m, kv * g, d]
            attended = attended.view(num_kv_heads, count, per_kv_head, head_dim)
            output[first : last + 1] = attended.transpose(0, 1).flatten(1, 2)
        return output

    def valid(self, slot: Hashable) -> BoolTensor:
        """Which positions are written. Returns `[num_sequences, max_length]`, bool, on the host."""
        return self._valid[slot].clone()

    def keys(self, slot: Hashable) -> Tensor:
        """`[num_sequences, num_kv_heads, max_length, head_dim]`, the keys; unwritten positions hold anything."""
        return self._keys[slot]

    def values(self, slot: Hashable) -> Tensor:
        """`[num_sequences, num_kv_heads, max_length, head_dim]`, the stored values, as `keys`."""
        return self._values[slot]

    def forget(self, sequence: int) -> None:
        """Free every slot of one sequence for another one."""
        for valid in self._valid.values():
            valid[sequence] = False
