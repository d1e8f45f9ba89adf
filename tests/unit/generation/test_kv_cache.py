# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""TokenPositions, and the key/value cache against attention written out position by position."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ee.generation.decoding_model import SequenceRows, TokenPositions
from nemo_ee.generation.kv_cache import KVCache

HEADS, KV_HEADS, DIM = 6, 2, 4


def write(cache, slot, positions, key, value):
    cache.write(slot, cache.place(positions), torch.cat((key, value), dim=1))


def attend(cache, slot, query, positions, scale):
    """`[n, H, d]`"""
    return cache.attend(slot, cache.place(positions), query, scale).unflatten(1, (HEADS, DIM))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(query, keys, values, sequence_of, position_of, scale):
    """keys, values: dict (sequence, position) -> [kv, d]."""
    output = torch.empty_like(query)
    for row, (sequence, position) in enumerate(zip(sequence_of, position_of, strict=True)):
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = [float(query[row, head] @ keys[sequence, p][kv]) * scale for p in range(position + 1)]
            weights = [math.exp(s - max(scores)) for s in scores]
            mixed = sum(w * values[sequence, p][kv] for p, w in enumerate(weights)) / sum(weights)
            output[row, head] = mixed
    return output


def test_items_group_by_sequence():
    positions = TokenPositions.of({0: [3], 2: [0, 1, 5], 3: [7, 8]})
    assert positions.sequence.tolist() == [0, 2, 2, 2, 3, 3] and positions.position.tolist() == [3, 0, 1, 5, 7, 8]
    assert positions.groups == (
        SequenceRows(0, 0, 0, 4, range(3, 4)),
        SequenceRows(2, 1, 3, 6, (0, 1, 5)),
        SequenceRows(3, 4, 5, 9, range(7, 9)),
    )
    picked = positions.select(torch.tensor([0, 3, 4]))
    assert [(group.sequence, *group.positions) for group in picked.groups] == [(0, 3), (2, 5), (3, 7)]
    by_hand = TokenPositions(positions.sequence, positions.position)  # as a model adapter may make them
    assert by_hand.groups == positions.groups and len(by_hand) == 6


@pytest.mark.parametrize("pairs", [([0, 0], [1, 1]), ([0, 0], [2, 1]), ([1, 0], [0, 0])])
def test_items_must_ascend(pairs):
    with pytest.raises(AssertionError, match="ascend"):
        _ = TokenPositions(*map(torch.tensor, pairs)).groups


def test_ragged_writes_and_attention_equal_the_naive_loop():
    cache = KVCache(["a", "b"], 3, 10, KV_HEADS, DIM, checked=True)
    keys, values = {}, {}
    # Sequence 0 is filled in two goes, sequence 2 in one with a single query; sequence 1 stays empty.
    for seed, positions in enumerate([{0: [0, 1, 2], 2: [0]}, {0: [3, 4], 2: [1, 2, 3, 4, 5]}, {2: [6]}]):
        positions = TokenPositions.of(positions)
        n = len(positions)
        key, value = random(n, KV_HEADS, DIM, seed=seed), random(n, KV_HEADS, DIM, seed=seed + 10)
        query = random(n, HEADS, DIM, seed=seed + 20)
        pairs = list(zip(positions.sequence.tolist(), positions.position.tolist(), strict=True))
        keys |= dict(zip(pairs, key, strict=True))
        values |= dict(zip(pairs, value, strict=True))
        write(cache, "a", positions, key, value)
        got = attend(cache, "a", query, positions, 0.5)
        expected = naive(query, keys, values, positions.sequence.tolist(), positions.position.tolist(), 0.5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    valid = torch.zeros(3, 10, dtype=torch.bool)
    valid[0, :5] = valid[2, :7] = True
    assert torch.equal(cache.valid("a"), valid)
    assert not cache.valid("b").any()
    for (sequence, position), key in keys.items():
        assert torch.equal(cache.keys("a")[sequence, :, position], key)


def test_earlier_queries_do_not_see_later_positions_already_written():
    cache = KVCache([0], 1, 4, KV_HEADS, DIM, checked=True)
    key, value, query = random(4, KV_HEADS, DIM), random(4, KV_HEADS, DIM, seed=1), random(4, HEADS, DIM, seed=2)
    everything = TokenPositions.of({0: range(4)})
    write(cache, 0, everything, key, value)
    together = attend(cache, 0, query, everything, 1.0)
    some = everything.select(torch.tensor([0, 2]))
    torch.testing.assert_close(attend(cache, 0, query[[0, 2]], some, 1.0), together[[0, 2]])


def test_writing_twice_gaps_and_overflow_are_caught():
    cache = KVCache([0], 2, 4, KV_HEADS, DIM, checked=True)
    kv = random(1, KV_HEADS, DIM)
    write(cache, 0, TokenPositions.of({1: [0]}), kv, kv)
    write(cache, 0, TokenPositions.of({0: [0]}), kv, kv)  # the other sequence is another place
    with pytest.raises(AssertionError, match=r"\(1, 0\) is written for the second time"):
        write(cache, 0, TokenPositions.of({1: [0]}), kv, kv)
    write(cache, 0, TokenPositions.of({1: [2]}), kv, kv)
    with pytest.raises(AssertionError, match=r"\(1, 1\) is attended to but was never written"):
        attend(cache, 0, random(1, HEADS, DIM), TokenPositions.of({1: [2]}), 1.0)
    with pytest.raises(AssertionError, match="position 4 is past 4"):
        write(cache, 0, TokenPositions.of({1: [4]}), kv, kv)
    with pytest.raises(AssertionError, match="second time"):
        write(cache, 0, TokenPositions.of({1: [1, 2]}), random(2, KV_HEADS, DIM), random(2, KV_HEADS, DIM))
    with pytest.raises(AssertionError, match="second time"):
        write(cache, 0, TokenPositions.of({1: [0, 3]}), random(2, KV_HEADS, DIM), random(2, KV_HEADS, DIM))
    cache.truncate(1, 0)
    assert cache.valid(0)[1].sum() == 0 and cache.valid(0)[0].sum() == 1
    write(cache, 0, TokenPositions.of({1: [0]}), kv, kv)


def test_half_precision_storage():
    cache = KVCache([0], 1, 3, KV_HEADS, DIM, dtype=torch.bfloat16)
    kv = random(3, KV_HEADS, DIM).bfloat16()
    positions = TokenPositions.of({0: range(3)})
    write(cache, 0, positions, kv, kv)
    query = random(3, HEADS, DIM, seed=1).bfloat16()
    got = attend(cache, 0, query, positions, 1.0)
    assert got.dtype == torch.bfloat16
    pairs = {(0, p): kv[p].float() for p in range(3)}
    expected = naive(query.float(), pairs, pairs, [0] * 3, range(3), 1.0)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
