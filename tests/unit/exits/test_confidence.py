# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Confidence against hand-written sums, and the rule for leaving at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ee.exits.confidence import can_leave, confidence, leaves
from nemo_ee.exits.criteria import NEVER_LEAVES, OF_LOGITS

LOGITS = torch.randn(4, 3, 17, generator=torch.Generator().manual_seed(0)) * 3


def naive(row, criterion):
    exponentials = [math.exp(x) for x in row]
    p = sorted((x / sum(exponentials) for x in exponentials), reverse=True)
    values = {"max_probability": p[0], "margin": p[0] - p[1], "entropy": -sum(x * math.log(x) for x in p)}
    return values[criterion]


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_equals_the_sum_written_out(criterion):
    got = confidence(LOGITS, criterion)
    assert got.shape == (4, 3) and got.dtype == torch.float32
    expected = torch.tensor([[naive(row, criterion) for row in block] for block in LOGITS.double().tolist()])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_half_precision_logits_are_read_in_fp32(criterion):
    half = LOGITS.bfloat16()
    assert torch.equal(confidence(half, criterion), confidence(half.float(), criterion))


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_the_edges_never_leave_however_sure(criterion):
    certain = torch.full((1, 9), -math.inf)
    certain[0, 4] = 0.0
    value = confidence(certain, criterion)
    assert value.item() == NEVER_LEAVES[criterion]
    assert not leaves(value, NEVER_LEAVES[criterion], criterion)
    assert not can_leave(NEVER_LEAVES[criterion], criterion)
    # The control: the smallest step away from the edge lets it leave.
    near = 1.0 - 2**-20 if criterion != "entropy" else 2**-20
    assert leaves(value, near, criterion) and can_leave(near, criterion)


def test_the_rule_is_strict_and_entropy_is_reversed():
    half = torch.tensor([0.5])
    assert leaves(half, 0.49, "max_probability") and not leaves(half, 0.5, "max_probability")
    assert leaves(half, 0.51, "entropy") and not leaves(half, 0.5, "entropy")


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_broken_logits_never_leave(criterion):
    value = confidence(torch.full((1, 5), math.nan), criterion)
    assert not leaves(value, 1e9 if criterion == "entropy" else 0.0, criterion)


def test_uniform_and_single_token_vocabularies():
    assert confidence(torch.zeros(1, 8), "entropy").item() == pytest.approx(math.log(8), rel=1e-6)
    assert confidence(torch.zeros(1, 8), "margin").item() == 0.0
    assert confidence(torch.zeros(1, 1), "margin").item() == 1.0


@pytest.mark.parametrize("call", [lambda c: confidence(LOGITS, c), lambda c: leaves(LOGITS, 0.5, c)])
def test_unknown_criterion(call):
    with pytest.raises(ValueError, match="criterion = 'perplexity' is unknown; use one of max_probability, margin"):
        call("perplexity")
