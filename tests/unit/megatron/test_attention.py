# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention in one call of torch against Megatron's own, which forms all scores: values and gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_ee.megatron.model.layer_spec import TorchAttention
from tests.helpers.core_models import relative_difference, set_up_groups

LENGTH, BATCH, HEADS, WIDTH = 12, 2, 4, 8


def _attend(kind: type, groups: int, mask: Tensor | None, **settings) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    set_up_groups()
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=groups,
        attention_dropout=0.0, **settings,
    )  # fmt: skip
    module = kind(config, 1, AttnMaskType.causal, "self").eval()
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH, BATCH, count, WIDTH) for count in (HEADS, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    result = module(*inputs, mask)
    return [result, *torch.autograd.grad(result.square().sum(), inputs)]


def _documents() -> Tensor:
    """Causal, and nothing before position 5 is seen from it on."""
    masked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    masked[5:, :5] = True
    return masked[None, None]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_megatrons(groups: int, masked: bool) -> None:
    mask = _documents() if masked else None
    expected = _attend(DotProductAttention, groups, mask)
    for ours, theirs in zip(_attend(TorchAttention, groups, mask), expected, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
    other = _attend(TorchAttention, groups, None if masked else _documents())
    assert relative_difference(other[0], expected[0]) > 0.01, "control: the mask counts"


def test_settings_that_torch_does_not_have_go_to_megatron() -> None:
    expected = _attend(DotProductAttention, 2, None, apply_query_key_layer_scaling=True)
    found = _attend(TorchAttention, 2, None, apply_query_key_layer_scaling=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
