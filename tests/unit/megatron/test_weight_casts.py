# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A weight is cast once while it stays the same, no changed weight is read from before, and no more than two casts
live."""

from __future__ import annotations

import contextlib
import weakref

import torch

from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard
from nemo_ee.megatron.loss.weight_casts import WeightCasts

BF16 = torch.bfloat16


def _weight(*, trained: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(12, 8), requires_grad=trained)


def test_one_cast_inside_a_block() -> None:
    casts, own, shared = WeightCasts(), _weight(trained=True), _weight(trained=False)
    with casts:
        first = casts.of([own, shared], BF16)
        again = casts.of([shared, own], BF16)
        assert again[0] is first[1] and again[1] is first[0]
        assert torch.equal(first[0], own.detach().to(BF16)) and not first[0].requires_grad
        assert casts.of([own], torch.float32)[0].data_ptr() == own.data_ptr()  # no copy where none is needed
    assert casts.of([own], BF16)[0] is not casts.of([own], BF16)[0]


def test_a_weight_that_an_optimizer_has_stepped_is_cast_again() -> None:
    casts, own = WeightCasts(), _weight(trained=True)
    optimizer, seen = torch.optim.AdamW([own], lr=0.5, fused=True), []
    for _ in range(2):
        with casts:
            seen.append(casts.of([own], BF16)[0].clone())
            assert torch.equal(seen[-1], own.detach().to(BF16))
        own.grad = torch.ones_like(own)
        optimizer.step()
    assert not torch.equal(*seen)


def test_at_most_one_frozen_and_one_trained_cast_live() -> None:
    casts = WeightCasts()
    weights = [_weight(trained=index % 2 == 0) for index in range(6)]
    with casts:
        alive = [weakref.ref(casts.of([weight], BF16)[0]) for weight in weights]
        assert [own() is not None for own in alive] == [False] * 4 + [True] * 2
    assert all(own() is None for own in alive)


def test_losses_and_gradients_are_those_of_fresh_casts() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels, mask = torch.randn(5, 8, generator=generator), torch.arange(5), torch.ones(5)
    vocabulary, results = VocabularyShard(0, 12, None), []
    for casts in (None, WeightCasts()):
        block = contextlib.nullcontext() if casts is None else casts
        weight = torch.nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)))
        with block:
            for _ in range(2):
                loss = linear_cross_entropy(
                    [inputs], [weight], labels, mask, vocabulary=vocabulary, grad_scale=1.0, dtype=BF16, casts=casts
                ).sums.loss
        results.append((loss, weight.grad))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
