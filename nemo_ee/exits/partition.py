# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Cut a row of costs into contiguous parts so that the largest part is as small as possible.

In a pipeline whose stages are decoupled the throughput is that of the slowest stage, so the largest part is what
counts. Among the cuts with the smallest largest part the one with the smallest sum of squares is taken (the other
stages are even too, so none of them becomes the next bottleneck when a cost is a little off), and among those the one
whose earlier parts are longer (the early stages without exits then hold the hidden states). Equal costs give the
even cut, longer parts first.

Exact, by dynamic programming over the suffixes: O(parts * items^2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# Sums of the same floats in another order are the same cut.
_SLACK = 1.0 + 1e-9


def balanced_cut(costs: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Lengths of the parts.

    Args:
        costs: cost of each item, in order; not negative, any unit.
        num_parts: number of parts, 1 <= num_parts <= len(costs); every part gets at least one item.
    """
    num_items = len(costs)
    assert 1 <= num_parts <= num_items, f"{num_parts} parts of {num_items} items"
    sums = list(itertools.accumulate(costs, initial=0.0))
    limit = _suffix_table(sums, num_parts, max, lambda cost: cost)[num_parts][0] * _SLACK
    squares = _suffix_table(
        sums, num_parts, lambda a, b: a + b, lambda cost: cost * cost if cost <= limit else math.inf
    )
    lengths: list[int] = []
    start = 0
    for parts_left in range(num_parts, 1, -1):
        end = max(
            end
            for end in range(start + 1, num_items - parts_left + 2)
            if (cost := sums[end] - sums[start]) <= limit
            and cost * cost + squares[parts_left - 1][end] <= squares[parts_left][start] * _SLACK
        )
        lengths.append(end - start)
        start = end
    return (*lengths, num_items - start)


def _suffix_table(sums: Sequence[float], num_parts: int, join, score) -> list[list[float]]:
    """table[p][i]: smallest joined score of the items from i on, cut into p parts."""
    num_items = len(sums) - 1
    table = [[math.inf] * (num_items + 1) for _ in range(num_parts + 1)]
    for start in range(num_items):
        table[1][start] = score(sums[num_items] - sums[start])
    for parts in range(2, num_parts + 1):
        for start in range(num_items - parts + 1):
            table[parts][start] = min(
                join(score(sums[end] - sums[start]), table[parts - 1][end])
                for end in range(start + 1, num_items - parts + 2)
            )
    return table
