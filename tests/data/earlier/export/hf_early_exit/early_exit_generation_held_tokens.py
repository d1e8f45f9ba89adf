# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens that a sequence may not have yet: stop tokens before its least length.

May import: torch and `nemo_ee.generation.items`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .early_exit_generation_items import Items


class HeldTokens:
    """What each slot's sequence may not have before which position."""

    def __init__(self) -> None:
        self._by_slot: dict[int, tuple[int, Sequence[int]]] = {}

    def __len__(self) -> int:
        """How many slots hold tokens."""
        return len(self._by_slot)

    def hold(self, slot: int, first: int, tokens: Collection[int]) -> None:
        """No token of the slot's sequence before position `first` is one of these."""
        self._by_slot[slot] = (first, sorted(tokens))

    def release(self, slot: int, position: int | None = None) -> None:
        """Forget what a slot holds; given a position before which nothing is read again, only if that is past it."""
        if slot in self._by_slot and (position is None or position + 1 >= self._by_slot[slot][0]):
            del self._by_slot[slot]

    def without(self, logits: Tensor, items: Items) -> Tensor:
        """`-inf` for the tokens that may not yet follow these items; the same tensor where there are none.

        Args:
            logits: `[n, v]`, for the tokens after the items; not changed.
            items: n pairs.
        """
        rows: list[int] = []
        columns: list[int] = []
        for row, (slot, position) in enumerate(zip(*(side.tolist() for side in items.on_host), strict=True)):
            first, tokens = self._by_slot.get(slot, (0, ()))
            if position + 1 < first:
                rows += [row] * len(tokens)
                columns += tokens
        if not rows:
            return logits
        index = torch.tensor([rows, columns], device=logits.device)
        return logits.index_put((index[0], index[1]), logits.new_tensor(float("-inf")))
