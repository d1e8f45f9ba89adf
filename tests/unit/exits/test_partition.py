# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The balanced cut against every possible cut, exactly."""

from __future__ import annotations

import itertools
import random

import pytest

from nemo_ee.exits.partition import balanced_cut


def every_cut(num_items: int, num_parts: int) -> list[tuple[int, ...]]:
    """Lengths of the parts of every cut."""
    cuts = itertools.combinations(range(1, num_items), num_parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_items))) for cut in cuts]


def preference(costs: list[float], lengths: tuple[int, ...]) -> tuple:
    """Smaller is better: the largest part, the sum of squares, then longer parts first."""
    ends = list(itertools.accumulate(lengths))
    parts = [sum(costs[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return max(parts), sum(part * part for part in parts), tuple(-length for length in lengths)


def test_it_is_the_best_of_all_cuts() -> None:
    """Quarters, so that sums are exact and ties are ties."""
    draw = random.Random(1)
    differs_from_even = 0
    for _ in range(500):
        num_items = draw.randint(1, 9)
        num_parts = draw.randint(1, num_items)
        costs = [draw.choice([0.0, 0.5, 1.0, 1.0, 1.0, 4.5, 2.25]) for _ in range(num_items)]
        best = min(every_cut(num_items, num_parts), key=lambda lengths: preference(costs, lengths))
        assert balanced_cut(costs, num_parts) == best, (costs, num_parts)
        differs_from_even += best != balanced_cut([1.0] * num_items, num_parts)
    assert differs_from_even > 100, "control: costs matter"


@pytest.mark.parametrize(
    ("costs", "num_parts", "expected"),
    [
        ([1] * 7, 3, (3, 2, 2)),  # equal costs: as even as possible, longer parts first
        ([0.0] * 3, 2, (2, 1)),
        ([1, 1, 1, 1, 1, 5], 2, (5, 1)),  # one exit at the end weighs as much as five layers
        ([9, 1, 1, 1, 1], 3, (1, 2, 2)),  # nothing helps the first part, the others are even all the same
        ([0.1] * 9, 3, (3, 3, 3)),  # sums of floats differ in the last bit
    ],
)
def test_by_hand(costs: list[float], num_parts: int, expected: tuple[int, ...]) -> None:
    assert balanced_cut(costs, num_parts) == expected


def test_large_models_are_cut_too() -> None:
    lengths = balanced_cut([1.0 + (layer % 16 == 15) * 4.5 for layer in range(126)], 16)
    assert sum(lengths) == 126 and min(lengths) >= 1
