# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hidden states of several sequences at one depth of the stack."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nemo_ee.generation.decoding_model import TokenPositions


@dataclasses.dataclass(eq=False)
class HiddenBatch:
    """Hidden states at one depth.

    Attributes:
        positions: slot -> its positions, both ascending.
        hidden: `[n, h]`, in that order.
        rows: the same as a `TokenPositions`, for the model. Made when it is needed.
    """

    positions: dict[int, list[int]]
    hidden: Tensor
    rows: TokenPositions | None = None

    def chunks(self) -> dict[int, Tensor]:
        """Each slot's hidden states, `[m, h]`."""
        if len(self.positions) == 1:
            return dict.fromkeys(self.positions, self.hidden)
        sizes = [len(own) for own in self.positions.values()]
        return dict(zip(self.positions, self.hidden.split(sizes), strict=True))

    def last_rows(self) -> dict[int, int]:
        """The row of each slot's newest position."""
        ends = accumulate(len(own) for own in self.positions.values())
        return {slot: end - 1 for slot, end in zip(self.positions, ends, strict=True)}

    @staticmethod
    def merge(parts: Iterable[HiddenBatch]) -> HiddenBatch:
        """Join batches; of each slot, earlier batches hold earlier positions."""
        positions: dict[int, list[int]] = defaultdict(list)
        chunks: dict[int, list[Tensor]] = defaultdict(list)
        for part in parts:
            for slot, chunk in part.chunks().items():
                positions[slot] += part.positions[slot]
                chunks[slot].append(chunk)
        order = sorted(positions)
        hidden = torch.cat([chunk for slot in order for chunk in chunks[slot]])
        return HiddenBatch({slot: positions[slot] for slot in order}, hidden)


def pick_rows(hidden: Tensor, positions: TokenPositions, rows: Sequence[int]) -> tuple[Tensor, TokenPositions]:
    """These rows (ascending) of the hidden states and positions; the same objects where they are all rows."""
    if len(rows) == len(positions):
        return hidden, positions
    index = torch.tensor(rows, dtype=torch.long)
    return hidden[index.to(hidden.device)], positions.select(index)
